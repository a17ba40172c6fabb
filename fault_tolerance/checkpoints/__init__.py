"""The training state in files that any layout loads."""
