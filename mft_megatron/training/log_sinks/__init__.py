"""Sinks of the log of a run: each may fail without ending the run."""
