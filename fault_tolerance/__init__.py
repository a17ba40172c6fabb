"""Bytes that survive and judgements on records: erasure code, vaults, restore, detection.

Floor 1 of 4: imports `parallel` only, and has never heard of Ray.
"""
