"""The job: config, model, data, trainer, worker, plan, the controller's loop, telemetry.

Floor 2 of 4: imports `parallel` and `fault_tolerance`, and has never heard of Hydra.
"""
