"""What a person types: one file per command. Floor 3 of 4."""
