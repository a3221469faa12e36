"""Which layers have experts, as ``--moe-layer-freq`` says it."""


def expert_layers(num_layers: int, num_experts: int | None, frequency: int | str) -> tuple[bool, ...]:
    """Of each layer, whether it has experts.

    Args:
        num_layers: of the model.
        num_experts: of each layer that has any; ``None`` where none has.
        frequency: from :func:`.layer_pattern.layer_frequency`. A list decides the length of the result, whatever
            ``num_layers``.
    """
    if num_experts is None:
        return (False,) * num_layers
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(num_layers))
    return tuple(value == "1" for value in frequency.strip("[]").split(","))
