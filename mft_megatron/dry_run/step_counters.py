"""Host waits, copies, messages and work of one step."""

from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .code_lines import code_line
from .memory_account import MemoryAccount
from .operations import operations_of
from .rank_report import Copies, HostWaits, Messages


class StepCounters:
    """Listens to a simulated GPU: counts what a step does, and passes memory on to its account.

    Attributes:
        memory: the account of the GPU's memory.
        host: the account of tensors on the host; ``None`` while no one asks for it.
        times: what counts of micro-batches are multiplied with, where not all of a step are computed.
    """

    def __init__(self, group_name: Callable[[dist.ProcessGroup], str]):
        """Prepare.

        Args:
            group_name: names a process group.
        """
        self.memory = MemoryAccount()
        self.host: MemoryAccount | None = None
        self._group_name = group_name
        self.times = Fraction(1)
        self.reset()

    def reset(self) -> None:
        """Count from 0, and look for the peak from now on."""
        # the last part of each key is whether it is of a micro-batch
        self._operations: Counter[tuple[bool]] = Counter()
        self._kernels: Counter[tuple[bool]] = Counter()
        self._waits: Counter[tuple[str, str, bool]] = Counter()
        self._copies: Counter[tuple[str, bool, bool]] = Counter()
        self._copied_bytes: Counter[tuple[str, bool, bool]] = Counter()
        self._messages: Counter[tuple[str, str, int, bool]] = Counter()
        self._message_bytes: Counter[tuple[str, str, int, bool]] = Counter()
        self.memory.reset_peak()

    def ran(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        outputs: list[Tensor],
        values: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Count an operator."""
        if operator.is_view:
            self.memory.add(outputs)
            return
        line = code_line()
        self._kernels[line.scheduled,] += 1
        self._operations[line.scheduled,] += operations_of(operator, arguments, outputs, values)
        self.memory.add(outputs, line)

    def waited(self, kind: str) -> None:
        """Count a wait of the host."""
        line = code_line()
        self._waits[line.text, kind, line.scheduled] += 1

    def copied(self, size: int, pinned: bool, waits: bool) -> None:
        """Count a copy to the GPU."""
        line = code_line()
        self._copies[line.text, pinned, line.scheduled] += 1
        self._copied_bytes[line.text, pinned, line.scheduled] += size
        if waits:
            self._waits[line.text, "pageable copy" if not pinned else "copy", line.scheduled] += 1

    def on_host(self, tensors: list[Tensor]) -> None:
        """Count tensors on the host, if anyone asks for them."""
        if self.host is not None:
            self.host.add(tensors)

    def sent(self, kind: str, group: dist.ProcessGroup, tensors: Iterable[Tensor], size: int) -> None:
        """Count a message."""
        key = kind, self._group_name(group), group.size(), code_line().scheduled
        self._messages[key] += 1
        self._message_bytes[key] += size
        self.memory.send(tensors)

    def entered_model(self) -> None:
        """Begin a forward pass."""
        self.memory.begin_forward()

    def left_module(self, inputs: list[Tensor]) -> None:
        """Take what a module has made and still is alive for activations."""
        self.memory.end_module(inputs)

    def resized(self, storage: Any) -> None:
        """Count a storage's new size."""
        self.memory.resize(storage)

    def fused(self, begins: bool) -> None:
        """Begin or end a region that is one kernel."""
        (self.memory.begin_kernel if begins else self.memory.end_kernel)()

    @property
    def operations(self) -> int:
        """Floating-point operations of a step."""
        return self._of_step(self._operations, ())

    @property
    def kernels(self) -> int:
        """Operators of a step that launch a kernel."""
        return self._of_step(self._kernels, ())

    def waits(self) -> tuple[HostWaits, ...]:
        """Waits of a step, the most frequent first."""
        waits = [
            HostWaits(*key, self._of_micro_batches(self._waits, key), self._waits[(*key, False)])
            for key in dict.fromkeys(key[:-1] for key in self._waits)
        ]
        return tuple(sorted(waits, key=lambda wait: -wait.in_micro_batches - wait.outside))

    def copies(self) -> tuple[Copies, ...]:
        """Copies to the GPU in a step, the most bytes first."""
        copies = [
            Copies(
                *key,
                self._of_step(self._copies, key),
                self._of_step(self._copied_bytes, key),
                self._of_micro_batches(self._copies, key),
            )
            for key in dict.fromkeys(key[:-1] for key in self._copies)
        ]
        return tuple(sorted(copies, key=lambda one: -one.bytes))

    def messages(self) -> tuple[Messages, ...]:
        """Messages of a step, the most bytes first."""
        messages = [
            Messages(*key, self._of_step(self._messages, key), self._of_step(self._message_bytes, key))
            for key in dict.fromkeys(key[:-1] for key in self._messages)
        ]
        return tuple(sorted(messages, key=lambda one: -one.bytes))

    def _of_micro_batches(self, counts: Counter[Any], key: tuple[Any, ...]) -> int:
        """The count of all micro-batches of a step, from that of the computed ones."""
        return round(counts[(*key, True)] * self.times)

    def _of_step(self, counts: Counter[Any], key: tuple[Any, ...]) -> int:
        return self._of_micro_batches(counts, key) + counts[(*key, False)]
