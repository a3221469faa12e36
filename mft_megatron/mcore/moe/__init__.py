"""Mixtures of experts: routing, and losses that balance the load."""
