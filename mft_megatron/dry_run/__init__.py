"""Dry runs: the real step of any rank of any parallel layout, on tensors without content, and what it would need."""
