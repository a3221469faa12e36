"""The simulated GPU itself: every operator of torch passes through here while a dry run is going on.

::

    device="cuda"            ─► the meta device
    a value is read          ─► a number is answered, the host has waited
    a copy to the GPU        ─► counted, pinned or not
    a copy to the host       ─► zeros; the host has waited
    a message                ─► counted; nothing is sent
    a size depends on values ─► they are known, or it is an error; the host has waited
    any other operator       ─► runs on shapes alone, and on values where they are known
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mft_megatron.errors import InputError

from .cuda_functions import META, as_pinned
from .expert_load import ExpertLoad
from .known_values import KnownValues
from .listener import listener

aten = torch.ops.aten
# names of torch's collectives, without the underscore at their ends
KINDS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "allgather_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "recv": "receive",
    "recv_any_source": "receive",
}
# a tensor of this many bytes keeps its values when it is copied to the GPU
KNOWN_COPIES = 2**21
# a copy to the host of more bytes than this has no content
HOST_CONTENT = 2**20


class SimulatedDevice(TorchDispatchMode):
    """Runs torch's operators on the meta device in place of CUDA, and tells the listener what they would do."""

    def __init__(self, answers: dict[str, float], load: ExpertLoad | None = None):
        """Prepare.

        Args:
            answers: what is answered where a function of this name reads an unknown value; 1 elsewhere.
            load: of experts; ``None`` where the model has none.
        """
        super().__init__()
        self._answers, self._load = answers, load
        self._values = KnownValues()
        # storages without content that stand for large ones on the host
        self._host: Any = WeakIdKeyDictionary()

    def run(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._send(func, args, kwargs)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            listener().waited("value")
            known = self._values.of(args[0])
            return self._answer(args[0].dtype) if known is None else known.item()
        if kwargs.get("pin_memory"):
            return as_pinned(func(*args, **{**kwargs, "pin_memory": False}))
        device = kwargs.get("device")
        if device is not None and device.type == "cuda":
            kwargs = {**kwargs, "device": META}
        if func is aten._to_copy.default:
            out = self._to(func, args, kwargs)
        elif func is aten.copy_.default:
            out = self._copy(func, args, kwargs)
        elif func in (aten.masked_select.default, aten.nonzero.default) and args[0].is_meta:
            out = self._sized(func, args)
        else:
            out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        on_host = [leaf for leaf in outputs if not leaf.is_meta or self._is_on_host(leaf, args)]
        if on_host:
            listener().on_host(on_host)
            outputs = [leaf for leaf in outputs if all(leaf is not one for one in on_host)]
        self._values.follow(func, args, kwargs, outputs)
        if outputs:
            if func is aten.topk.default and self._load is not None and self._load.routes(outputs[1], args[0]):
                self._values.give(outputs[1], self._load.chosen(len(args[0])))
            listener().ran(func, args, outputs, self._values.of)
        return out

    def _sized(self, func: Any, args: Any) -> Tensor:
        """An operator whose result's size depends on values."""
        listener().waited("size")
        mask = self._values.of(args[-1])
        if mask is None:
            raise InputError(f"a dry run cannot know the size of {func}'s result, which depends on values")
        if func is aten.nonzero.default:
            return args[0].new_empty((int(mask.count_nonzero()), args[0].dim()), dtype=torch.long)
        return args[0].new_empty(int(mask.expand(torch.broadcast_shapes(mask.shape, args[0].shape)).sum()))

    def _is_on_host(self, output: Tensor, args: Any) -> bool:
        """Whether a result without content stands for one on the host, as what it was made from does."""
        if not self._host:
            return False
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_meta]
        if not inputs or not all(leaf.untyped_storage() in self._host for leaf in inputs):
            return output.untyped_storage() in self._host
        self._host[output.untyped_storage()] = True
        return True

    def _answer(self, dtype: torch.dtype) -> float | int | bool:
        frame: Any = sys._getframe(2)
        value = 1.0
        while frame is not None:
            if frame.f_code.co_name in self._answers:
                value = self._answers[frame.f_code.co_name]
                break
            frame = frame.f_back
        if dtype == torch.bool:
            return bool(value)
        return value if dtype.is_floating_point else int(value)

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, target = args[0], kwargs.get("device")
        if target is None or source.device.type == target.type:
            return func(*args, **kwargs)
        if target.type == META.type:
            _host_to_device(source, kwargs.get("non_blocking", False))
            copy = func(*args, **kwargs)
            if source.nbytes <= KNOWN_COPIES:
                self._values.give(copy, source)
            return copy
        if not kwargs.get("non_blocking", False):
            listener().waited("copy")
        known, dtype = self._values.of(source), kwargs.get("dtype") or source.dtype
        return self._to_host(source, dtype) if known is None else known.to(dtype, copy=True)

    def _to_host(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor of the simulated GPU on the host: zeros, or without content where it is large."""
        if source.numel() * dtype.itemsize <= HOST_CONTENT:
            return torch.zeros(source.shape, dtype=dtype)
        copy = torch.empty(source.shape, dtype=dtype, device=META)
        self._host[copy.untyped_storage()] = True
        return copy

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if source.is_meta and not target.is_meta:
            if not non_blocking and source.untyped_storage() not in self._host:
                listener().waited("copy")
            known = self._values.of(source)
            if known is not None:
                target.copy_(known)
            return target
        if target.is_meta and not source.is_meta and source.dim():
            _host_to_device(source, non_blocking)
            out = func(*args, **kwargs)
            if source.nbytes <= KNOWN_COPIES and target.is_contiguous():
                self._values.give(target, source)
            return out
        return func(*args, **kwargs)

    def _send(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.split("::")[1]
        name = name.removesuffix("_")
        result = func(*args, **kwargs)
        if name == "_allgather_base" and (known := self._values.of(args[1])) is not None:
            # ranks route their tokens alike
            self._values.give(args[0], known.flatten().repeat(args[0].numel() // known.numel()).view(args[0].shape))
        elif name != "send":
            self._values.forget(leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
        leaves = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
        group = next(
            (
                dist.ProcessGroup.unbox(leaf)
                for leaf in tree_leaves([args, kwargs])
                if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
            ),
            None,
        )
        if group is None:
            return result
        if name in ("barrier", "monitored_barrier"):
            listener().waited("device")
            listener().sent("barrier", group, (), 0)
            return result
        sides = [_bytes(side) for side in args if isinstance(side, Tensor | list | tuple)]
        listener().sent(KINDS.get(name, name), group, leaves, max(sides, default=0))
        return result


# Set afterwards, because torch would wrap the method of a class body for its compiler, whose import takes seconds.
setattr(SimulatedDevice, "__torch_dispatch__", SimulatedDevice.run)  # noqa: B010


def _bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def _host_to_device(source: Tensor, non_blocking: bool) -> None:
    without_wait = source.is_pinned()
    listener().copied(source.nbytes, without_wait, waits=not (without_wait and non_blocking))


@contextlib.contextmanager
def running(answers: dict[str, float], load: ExpertLoad | None = None) -> Iterator[None]:
    """Simulate the GPU: operators run on shapes, and the listener is told of them.

    Args:
        answers: what is answered where a function of this name reads an unknown value; 1 elsewhere.
        load: of experts; ``None`` where the model has none.
    """

    depth = 0

    def entered(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            listener().entered_model()

    def left(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        listener().left_module([leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.is_meta])

    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(entered),
        torch.nn.modules.module.register_module_forward_hook(left),
    ]
    try:
        with SimulatedDevice(answers, load):
            yield
    finally:
        for handle in handles:
            handle.remove()
