"""From a source of text to the samples of every step."""
