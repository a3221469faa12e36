"""Who is told what a simulated GPU would have done."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Listener(Protocol):
    """Receives what happens on the simulated GPU, at the moment when it happens."""

    def ran(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        outputs: list[Tensor],
        values: Callable[[Tensor], Tensor | None],
    ) -> None:
        """An operator has run on the simulated GPU.

        Args:
            operator: torch's, an overload.
            arguments: positional ones.
            outputs: tensors on the simulated GPU, also views and results in place.
            values: gives a CPU tensor with a tensor's values, ``None`` where they are unknown.
        """

    def waited(self, kind: str) -> None:
        """The host has waited for the GPU; ``kind`` is one of those of a report's ``HostWaits``."""

    def copied(self, size: int, pinned: bool, waits: bool) -> None:
        """A tensor of ``size`` bytes was copied to the GPU, from pinned memory or not; the host may have waited."""

    def on_host(self, tensors: list[Tensor]) -> None:
        """Tensors on the host that an operator has made or changed; large copies of the GPU's have no content."""

    def sent(self, kind: str, group: torch.distributed.ProcessGroup, tensors: Iterable[Tensor], size: int) -> None:
        """A message within a group; ``tensors`` are its buffers, ``size`` the larger of both directions in bytes."""

    def entered_model(self) -> None:
        """A module's forward pass begins that is within no other's."""

    def left_module(self, inputs: list[Tensor]) -> None:
        """A module's forward pass has ended; ``inputs`` are tensors that it was given."""

    def resized(self, storage: torch.UntypedStorage) -> None:
        """The memory of a storage was freed or allocated again."""

    def fused(self, begins: bool) -> None:
        """A region begins or ends that is one kernel on a GPU: only what is alive at its end was allocated."""


class Nobody:
    """Listens to nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


_listener: Any = Nobody()


def listener() -> Listener:
    """Whoever listens now."""
    return _listener


def listen(new: Listener | None) -> None:
    """Tell ``new`` from now on; ``None``: nobody."""
    global _listener
    _listener = Nobody() if new is None else new
