"""The erasure code, and which node holds what of it."""
