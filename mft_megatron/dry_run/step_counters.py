"""Host waits, copies, messages and work of one step."""

from collections import Counter
from collections.abc import Callable, Iterable
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
        operations: floating-point operations since the last reset.
        kernels: operators that launch a kernel since the last reset.
    """

    def __init__(self, group_name: Callable[[dist.ProcessGroup], str]):
        """Prepare.

        Args:
            group_name: names a process group.
        """
        self.memory = MemoryAccount()
        self.host: MemoryAccount | None = None
        self._group_name = group_name
        self.reset()

    def reset(self) -> None:
        """Count from 0, and look for the peak from now on."""
        self.operations = self.kernels = 0
        self._waits: Counter[tuple[str, str, bool]] = Counter()
        self._copies: Counter[tuple[str, bool, bool]] = Counter()
        self._copied_bytes: Counter[tuple[str, bool]] = Counter()
        self._messages: Counter[tuple[str, str, int]] = Counter()
        self._message_bytes: Counter[tuple[str, str, int]] = Counter()
        self.memory.reset_peak()

    def ran(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        outputs: list[Tensor],
        values: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Count an operator."""
        if not operator.is_view:
            self.kernels += 1
            self.operations += operations_of(operator, arguments, outputs, values)
        self.memory.add(outputs)

    def waited(self, kind: str) -> None:
        """Count a wait of the host."""
        line = code_line()
        self._waits[line.text, kind, line.scheduled] += 1

    def copied(self, size: int, pinned: bool, waits: bool) -> None:
        """Count a copy to the GPU."""
        line = code_line()
        self._copies[line.text, pinned, line.scheduled] += 1
        self._copied_bytes[line.text, pinned] += size
        if waits:
            self._waits[line.text, "pageable copy" if not pinned else "copy", line.scheduled] += 1

    def on_host(self, tensors: list[Tensor]) -> None:
        """Count tensors on the host, if anyone asks for them."""
        if self.host is not None:
            self.host.add(tensors)

    def sent(self, kind: str, group: dist.ProcessGroup, tensors: Iterable[Tensor], size: int) -> None:
        """Count a message."""
        key = kind, self._group_name(group), group.size()
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

    def waits(self) -> tuple[HostWaits, ...]:
        """Waits since the last reset, the most frequent first."""
        total: Counter[tuple[str, str]] = Counter()
        for (line, kind, _), count in self._waits.items():
            total[line, kind] += count
        return tuple(
            HostWaits(line, kind, self._waits[line, kind, True], self._waits[line, kind, False])
            for (line, kind), _ in total.most_common()
        )

    def copies(self) -> tuple[Copies, ...]:
        """Copies to the GPU since the last reset, the most bytes first."""
        return tuple(
            Copies(
                line,
                pinned,
                self._copies[line, pinned, True] + self._copies[line, pinned, False],
                size,
                self._copies[line, pinned, True],
            )
            for (line, pinned), size in self._copied_bytes.most_common()
        )

    def messages(self) -> tuple[Messages, ...]:
        """Messages since the last reset, the most bytes first."""
        return tuple(Messages(*key, self._messages[key], size) for key, size in self._message_bytes.most_common())
