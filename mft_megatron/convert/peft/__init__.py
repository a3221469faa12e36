"""Adapters in PEFT's format, both ways; listing and merging them."""
