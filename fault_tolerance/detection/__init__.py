"""Judgements on records of collectives, on numbers, on machines and on ways."""
