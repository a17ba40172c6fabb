"""What `plan.py` decides by: costs, layouts, seats, devices."""
