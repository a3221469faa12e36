"""Values of small tensors on the simulated GPU, where they follow from what the host copied there or chose.

Sizes of results may depend on values: how many tokens go to an expert, how long segments are. Such values are computed
on the CPU beside the operator that has no content, by the same operator.
"""

import functools
from collections.abc import Iterable
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
        written = _written(operator, args, kwargs)
        if operator in _FACTORIES:
            if not outputs or outputs[0].nbytes > MOST:
                return
            known: dict[int, Tensor | None] = {}
        elif not self._storages:
            return
        else:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
            known = {id(tensor): self.of(tensor) for tensor in inputs}
            if not known or any(values is None for values in known.values()):
                self.forget(written)
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
            self.forget(written)
            return
        # an operator that changes its arguments has changed their values, too
        for tensor, values in zip(outputs, results, strict=False):
            if tensor.untyped_storage() not in self._storages:
                self.give(tensor, values)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Know no longer what tensors hold, after they were changed by something unknown."""
        for tensor in tensors:
            self._storages.pop(tensor.untyped_storage(), None)


def _written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments of an operator that it changes."""
    return [
        leaf
        for position, name in _changed_arguments(operator)
        for leaf in tree_leaves(args[position] if position < len(args) else kwargs.get(name))
        if isinstance(leaf, Tensor) and leaf.is_meta
    ]


@functools.cache
def _changed_arguments(operator: Any) -> list[tuple[int, str]]:
    arguments = enumerate(operator._schema.arguments)
    return [(position, one.name) for position, one in arguments if one.alias_info and one.alias_info.is_write]


def _view(content: Tensor, tensor: Tensor) -> Tensor:
    """The part of a storage's bytes that a tensor shows."""
    return content.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
