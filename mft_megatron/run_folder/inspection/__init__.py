"""Checkpoints and run folders as ``tools/inspect_checkpoint.py`` shows them, without torch."""
