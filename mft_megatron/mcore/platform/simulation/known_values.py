"""Values of small tensors on the simulated GPU, where they follow from what the host copied there or chose.

Sizes of results may depend on values: how many tokens go to an expert, how long segments are. Such values are computed
on the CPU beside the operator that has no content, by the same operator.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
# bytes of a storage whose values are kept
MOST = 2**21
# of the largest element
_ALIGNMENT = 16
# operators whose results do not depend on the values of their inputs
_FACTORIES = {
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}


class KnownValues:
    """Values by storage, so that all views of one see the same."""

    def __init__(self) -> None:
        self._storages: Any = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, a CPU tensor that shares memory with those of other views; ``None``: unknown."""
        content = self._storages.get(tensor.untyped_storage())
        return None if content is None else _view(content, tensor)

    def give(self, tensor: Tensor, values: Tensor) -> None:
        """Say what a tensor holds; ``values`` has its shape."""
        size = tensor.untyped_storage().nbytes()
        if not 0 < size <= MOST:
            return
        content = torch.zeros(-(-size // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8)
        _view(content, tensor).copy_(values)
        self._storages[tensor.untyped_storage()] = content

    def follow(self, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Compute what an operator that has run has made, if the values of all that it took are known.

        Args:
            operator: torch's.
            args: of the operator.
            kwargs: of the operator.
            outputs: its results on the simulated GPU.
        """
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        if operator in _FACTORIES:
            if outputs[0].nbytes > MOST:
                return
            inputs = []
        elif not inputs or not self._storages:
            return
        known = {id(tensor): self.of(tensor) for tensor in inputs}
        if operator not in _FACTORIES and any(values is None for values in known.values()):
            self._forget(operator, inputs, outputs)
            return

        def on_host(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_meta:
                values = known.get(id(leaf))
                return torch.empty(leaf.shape, dtype=leaf.dtype) if values is None else values
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        host_args, host_kwargs = tree_map(on_host, (args, kwargs))
        try:
            results = [leaf for leaf in tree_leaves(operator(*host_args, **host_kwargs)) if isinstance(leaf, Tensor)]
        except (RuntimeError, TypeError):
            # an operator that the CPU does not have
            self._forget(operator, inputs, outputs)
            return
        for tensor, values in zip(outputs, results, strict=True):
            if tensor.untyped_storage() not in self._storages:
                self.give(tensor, values)

    def _forget(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Forget what was changed in place by something unknown."""
        for tensor in outputs:
            if not operator.is_view and any(tensor is one for one in inputs):
                self._storages.pop(tensor.untyped_storage(), None)


def _view(content: Tensor, tensor: Tensor) -> Tensor:
    """The part of a storage's bytes that a tensor shows."""
    return content.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
