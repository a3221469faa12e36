"""Verification of a checkpoint's files by all ranks of a run."""
