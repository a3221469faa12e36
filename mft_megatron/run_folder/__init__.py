"""A run folder: its files, its checkpoints and their descriptions, read and written without torch."""
