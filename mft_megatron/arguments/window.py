"""Sliding windows of attention, as ``--window-size`` and ``--window-attn-skip-freq`` say them."""

import json


def window_size(text: str) -> str:
    """The value of ``--window-size``: tokens to the left and to the right, ``LEFT,0`` or ``(LEFT,0)``.

    Raises:
        ValueError: not two whole numbers, a window to the right, or a negative one; -1 is for all tokens.
    """
    left, right = (int(number) for number in str(text).strip().removeprefix("(").removesuffix(")").split(","))
    if right != 0 or left < -1:
        raise ValueError(f"{text}: causal attention sees none to the right")
    return f"{left},{right}"


# argparse names the function where a value is refused
window_size.__name__ = "LEFT,0 (at least 0, or -1 for all tokens; causal attention sees none to the right)"


def window_layers(frequency: int | str | None) -> int | list[int] | None:
    """``--window-attn-skip-freq`` as Megatron-Core takes it, from :func:`.layer_pattern.layer_frequency`."""
    return json.loads(frequency) if isinstance(frequency, str) else frequency
