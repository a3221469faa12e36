"""Marks for folders of tests that run in ``make test-all`` only, but for a smoke run of each thing they test."""

from pathlib import Path

import pytest


def mark_slow(items, conftest):
    """Mark every test in the folder of ``conftest`` as slow unless it is marked ``smoke``."""
    folder = Path(conftest).parent
    for item in items:
        if folder in item.path.parents and item.get_closest_marker("smoke") is None:
            item.add_marker(pytest.mark.slow)
