"""A rank's parts beside the loop of `trainer.py`."""
