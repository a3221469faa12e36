"""The optimizer, its schedules and its state in checkpoints."""
