"""Everything in this folder needs a CUDA device, and nothing but PyTorch and Megatron-Core beside it."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REASON = "needs a CUDA device"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON))
