"""Bytes of a simulated GPU's memory over time, by category and by the line of code that allocated them."""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from .code_lines import CodeLine, code_line
from .rank_report import (
    ACTIVATIONS,
    CATEGORIES,
    COMMUNICATION,
    LOGITS,
    OPTIMIZER,
    TEMPORARIES,
    LiveTensors,
    Memory,
)

# torch's allocator rounds sizes up to this
ROUNDING = 512
LARGEST = 20
# where Megatron-Core makes the buffer of gathered inputs that all layers share
SHARED_BUFFER = "megatron/core/utils.py:"


def allocated(storage: torch.UntypedStorage) -> int:
    """Bytes that torch's allocator counts for a storage."""
    return -(-storage.nbytes() // ROUNDING) * ROUNDING


@dataclasses.dataclass
class _Block:
    """A storage that is alive; ``reference`` frees it in the account when it is gone."""

    size: int
    category: str
    line: str
    reference: "weakref.ref[torch.UntypedStorage]"


class MemoryAccount:
    """Storages that are alive, and the state at the peak.

    Attributes:
        now: bytes.
        by_category: bytes of each category now.
        keeps_activations: whether a backward pass follows, so that what a forward pass leaves are activations.
    """

    def __init__(self) -> None:
        self.keeps_activations = True
        self.now, self.by_category = 0, Counter[str](dict.fromkeys(CATEGORIES, 0))
        self._blocks: dict[int, _Block] = {}
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._peak, self._line = 0, ""
        self._at_peak: tuple[LiveTensors, ...] = ()
        self._by_category_at_peak: dict[str, int] = {}
        self._made: list[int] = []
        self._fused: list[list[weakref.ref[torch.UntypedStorage]]] = []

    def add(self, tensors: Iterable[Tensor], line: CodeLine | None = None) -> None:
        """Count the storages of tensors, unless they are known; ``line`` is the one that this is called for."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._blocks or not storage.nbytes():
                continue
            if self._fused:
                self._fused[-1].append(weakref.ref(storage))
                continue
            line = line or code_line()
            self._count(storage, line)

    def _count(self, storage: torch.UntypedStorage, line: CodeLine) -> None:
        key, size = id(storage), allocated(storage)
        category = OPTIMIZER if line.state else LOGITS if line.output else TEMPORARIES
        self._blocks[key] = _Block(size, category, line.text, weakref.ref(storage, lambda _: self._free(key)))
        self._made.append(key)
        self._change(self._blocks[key], size, 1)
        if self.now > self._peak:
            self._peak, self._line, self._by_category_at_peak = self.now, line.text, {}

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._keep_peak()
        self._change(block, -block.size, -1)

    def _change(self, block: _Block, size: int, count: int) -> None:
        self.now += size
        self.by_category[block.category] += size
        self._bytes[block.line, block.category] += size
        self._counts[block.line, block.category] += count

    def holds(self, key: int) -> bool:
        """Whether a storage is counted and alive; ``key`` is its ``id``."""
        return key in self._blocks

    def drop(self, tensor: Tensor) -> None:
        """Count a tensor no longer: it has no content on a real GPU either."""
        block = self._blocks.pop(id(tensor.untyped_storage()), None)
        if block is not None:
            self._change(block, -block.size, -1)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that has another size now."""
        block = self._blocks.get(id(storage))
        if block is None:
            return
        change = allocated(storage) - block.size
        if change < 0:
            self._keep_peak()
        self._change(block, change, 0)
        block.size += change
        if self.now > self._peak:
            self._peak, self._line, self._by_category_at_peak = self.now, code_line().text, {}

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are for; those that are not known are counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.is_meta and storage.nbytes():
                self.add([tensor])
                self._move(id(storage), category)

    def begin_forward(self) -> None:
        """Begin the forward pass of a model, or of a layer that is recomputed."""
        self._made = []

    def end_module(self, inputs: Iterable[Tensor]) -> None:
        """Count what a module was given, and what it has made and is still alive, for kept for the backward pass.

        torch's hooks on saved tensors would tell more, but a backward pass would get copies of weights, without the
        attributes by which Megatron-Core accumulates gradients.
        """
        if not self.keeps_activations:
            return
        for key in self._made:
            if key in self._blocks and not self._blocks[key].line.startswith(SHARED_BUFFER):
                self._move(key, ACTIVATIONS, (TEMPORARIES, COMMUNICATION))
        self._made = []
        for tensor in inputs:
            self._move(id(tensor.untyped_storage()), ACTIVATIONS, (TEMPORARIES, COMMUNICATION))

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Note that tensors are buffers of a message."""
        for tensor in tensors:
            self._move(id(tensor.untyped_storage()), COMMUNICATION, (TEMPORARIES,))

    def _move(self, key: int, category: str, of: Iterable[str] = CATEGORIES) -> None:
        block = self._blocks.get(key)
        if block is None or block.category == category or block.category not in of:
            return
        self._change(block, -block.size, -1)
        block.category = category
        self._change(block, block.size, 1)

    def begin_kernel(self) -> None:
        """Begin a region that is one kernel."""
        self._fused.append([])

    def end_kernel(self) -> None:
        """Count what is alive of what a kernel allocated."""
        alive = [storage for reference in self._fused.pop() if (storage := reference()) is not None]
        if self._fused:
            self._fused[-1] += map(weakref.ref, alive)
            return
        line = code_line()
        for storage in alive:
            if id(storage) not in self._blocks:
                self._count(storage, line)

    def reset_peak(self) -> None:
        """Look for the peak from now on."""
        self._peak, self._line, self._by_category_at_peak = self.now, code_line().text, {}

    def at_peak(self) -> Memory:
        """The state at the peak since the last reset."""
        self._keep_peak()
        return Memory(self._peak, self._by_category_at_peak, self._at_peak, self._line)

    def _keep_peak(self) -> None:
        """Keep the state while it still is that of the peak: only before memory is freed is it sure to be one."""
        if self._by_category_at_peak or self.now != self._peak:
            return
        self._by_category_at_peak = dict(self.by_category)
        self._at_peak = tuple(
            LiveTensors(line, category, self._counts[line, category], size)
            for (line, category), size in self._bytes.most_common(LARGEST)
            if size
        )
