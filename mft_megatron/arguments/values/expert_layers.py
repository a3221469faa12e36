"""Layers with experts, from ``--moe-layer-freq``."""

from .layer_pattern import numbers_of


def expert_layers(num_layers: int, num_experts: int | None, frequency: int | str) -> tuple[bool, ...]:
    """Return for each layer whether it has experts.

    Args:
        num_layers: layers of the model.
        num_experts: experts of a layer that has any; ``None`` if no layer has.
        frequency: result of :func:`.layer_pattern.layer_frequency`. If it is a list, the result has its length, not
            ``num_layers``.
    """
    if num_experts is None:
        return (False,) * num_layers
    numbers = numbers_of(frequency)
    if isinstance(numbers, int):
        return tuple(layer % numbers == 0 for layer in range(num_layers))
    return tuple(map(bool, numbers))
