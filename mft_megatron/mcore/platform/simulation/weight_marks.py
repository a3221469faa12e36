"""Marks that Megatron-Core's linear layers set on their weights in the backward pass, where a GPU is simulated."""

from typing import Any

from torch import Tensor


class _WithWeight:
    """A context of autograd whose saved weight is the parameter itself, not a tensor with its content."""

    def __init__(self, context: Any):
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor]:
        return self._context.saved_tensors[0], self._context.parameter


def keep_weights_of_linear_layers() -> None:
    """Let the backward pass of linear layers reach the parameter, which it marks when its gradient has been added.

    A dry run sees saved tensors in hooks, and what has gone through a hook comes back as another tensor, without marks.
    """
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear

    forward, backward = Linear.forward, Linear.backward

    def keep(context: Any, hidden: Tensor, weight: Tensor, *others: Any) -> Any:
        context.parameter = weight
        return forward(context, hidden, weight, *others)

    def with_weight(context: Any, gradient: Tensor) -> Any:
        return backward(_WithWeight(context), gradient)

    Linear.forward, Linear.backward = staticmethod(keep), staticmethod(with_weight)
