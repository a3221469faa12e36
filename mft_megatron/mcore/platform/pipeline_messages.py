"""Shapes of messages between pipeline stages that the receiver knows, in place of a message for each shape."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MessageShapes:
    """Shapes of the tensors that a rank receives of other pipeline stages, each in the order in which they come.

    Attributes:
        inputs: of forward passes.
        gradients: of the gradients of outputs.
    """

    inputs: Iterator[Shape]
    gradients: Iterator[Shape]


def take_known_shapes() -> None:
    """Let pipeline stages take shapes of messages from ``message_shapes`` of Megatron-Core's configuration.

    Where micro-batches differ in width, Megatron-Core sends each shape before its tensor and waits for the whole device
    and for the shape, in every message. Set a :class:`MessageShapes` before each run of the schedule.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    P2PCommunicator._communicate_shapes = _known


def _known(
    communicator: "P2PCommunicator", send_next: object, send_prev: object, recv_prev: bool, recv_next: bool
) -> tuple[Shape, Shape]:
    """Shapes of what comes from the previous and from the next stage; empty where nothing comes."""
    shapes: MessageShapes = communicator.config.message_shapes
    return next(shapes.inputs) if recv_prev else (), next(shapes.gradients) if recv_next else ()
