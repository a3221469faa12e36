"""Starts of a run and their ends: what is recorded of them, when to stop starting again, and what changed between."""
