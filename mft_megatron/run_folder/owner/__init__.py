"""The owner of a run folder: one process of one run may write into it, also on file systems of many machines."""
