"""Checks of a Hugging Face folder before it is served, and its export in 4 bits."""
