"""From what is seen of a crew to what is done about it."""
