"""Tensors that a computation keeps for its backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(compute: Callable[[], Tensor], *known: Tensor) -> int:
    """Bytes of all storages that autograd keeps after ``compute``, without those of ``known`` tensors."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(storages.values()) - sum(storages.pop(tensor.untyped_storage().data_ptr(), 0) for tensor in known)
