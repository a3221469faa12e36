"""Which layers have experts, as ``--moe-layer-freq`` says it."""

from .layer_pattern import numbers_of


def expert_layers(num_layers: int, num_experts: int | None, frequency: int | str) -> tuple[bool, ...]:
    """Of each layer, whether it has experts.

    Args:
        num_layers: of the model.
        num_experts: of each layer that has any; ``None`` where none has.
        frequency: from :func:`.values.layer_pattern.layer_frequency`. A list decides the length of the result, whatever
            ``num_layers``.
    """
    if num_experts is None:
        return (False,) * num_layers
    numbers = numbers_of(frequency)
    if isinstance(numbers, int):
        return tuple(layer % numbers == 0 for layer in range(num_layers))
    return tuple(map(bool, numbers))
