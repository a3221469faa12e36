"""Mixtures of experts: routing, balancing losses, counts."""
