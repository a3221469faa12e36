"""Checks of the options that need no device; ``table`` lists them in the order they run."""
