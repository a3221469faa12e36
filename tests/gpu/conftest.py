"""Marks for the tests of this folder, which need a CUDA device; optional packages are skipped where missing."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REASON = "needs a CUDA device"


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and skip them without a CUDA device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON))
