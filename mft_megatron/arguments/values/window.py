"""Sliding windows of attention, the values of ``--window-size``."""


def window_size(text: str) -> str:
    """Parse the value of ``--window-size``, ``LEFT,0`` or ``(LEFT,0)``: tokens to the left and to the right.

    Raises:
        ValueError: it is not two whole numbers, the right one is not 0, or the left one is below -1, all tokens.
    """
    left, right = (int(number) for number in str(text).strip().removeprefix("(").removesuffix(")").split(","))
    if right != 0 or left < -1:
        raise ValueError(f"{text}: causal attention sees none to the right")
    return f"{left},{right}"


# The message of argparse that refuses a value contains the function's name.
window_size.__name__ = "LEFT,0 (at least 0, or -1 for all tokens; causal attention sees none to the right)"
