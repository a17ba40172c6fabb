"""What a person sees of a run: progress, rows, W&B and other sinks, the report."""
