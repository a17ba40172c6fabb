"""Sharding and collectives: layouts, boxes, the atlas, and their application to a model.

Floor 0 of 4: imports nothing of `fault_tolerance`, `framework` or `launch`, and has never heard of failure.
"""
