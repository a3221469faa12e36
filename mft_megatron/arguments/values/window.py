"""Sliding windows of attention, as ``--window-size`` says them."""


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
