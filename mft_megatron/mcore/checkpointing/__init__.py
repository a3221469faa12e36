"""Weights and training state to and from disk."""
