"""The training state in the memory of the nodes: taken, kept, coded, found and restored."""
