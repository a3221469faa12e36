"""Check that a list of layers with a window has all layers."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.arguments.values.layer_pattern import numbers_of


def check_window(a: Arguments) -> str | None:
    """Check the length of ``--window-attn-skip-freq``."""
    layers = numbers_of(a.network.window_attn_skip_freq)
    if isinstance(layers, list) and len(layers) != a.network.num_layers:
        return (
            f"--window-attn-skip-freq is a list of {len(layers)} layers and --num-layers is {a.network.num_layers}; "
            "give as many"
        )
    return None
