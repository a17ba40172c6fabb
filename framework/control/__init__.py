"""The controller's parts: processes, vaults, checkpoints, history."""
