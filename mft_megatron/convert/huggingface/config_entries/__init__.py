"""Entries of ``config.json``: each kind reads its names into fields of an architecture, and writes them back."""
