"""Faults on demand, and what must be true of a run that had them."""
