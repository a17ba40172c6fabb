"""The values: Hydra groups as plain YAML. What they mean stands in `framework/config.py`."""
