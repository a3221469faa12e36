"""Entries for sliding windows."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.arguments.values.layer_pattern import layer_frequency, numbers_of
from mft_megatron.errors import InputError

from .entry import Config, Fields, flag, whole_number, whole_number_or_null

FULL, SLIDING = "full_attention", "sliding_attention"


class Window:
    """A sliding window on every layer: ``sliding_window`` tokens, including the token itself."""

    names = ("sliding_window",)

    def __init__(self, default: int | None):
        self._default = default

    def read(self, config: Config) -> Fields:
        """Read the window."""
        tokens = whole_number_or_null(config, "sliding_window", self._default)
        return {"window_size": None if tokens is None else f"{tokens - 1},0"}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the window."""
        return {"sliding_window": None if architecture.window is None else architecture.window + 1}


class WindowOfSomeLayers:
    """A sliding window on the layers from ``max_window_layers`` on, or on those that ``layer_types`` lists."""

    names = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Config) -> Fields:
        """Read the window and its layers."""
        layers, types = whole_number(config, "num_hidden_layers"), config.get("layer_types")
        in_use = flag(config, "use_sliding_window", False)
        tokens = whole_number_or_null(config, "sliding_window", 4096) if in_use else None
        first = whole_number(config, "max_window_layers", 28, at_least=0)
        windowed = [tokens is not None and layer >= first for layer in range(layers)]
        if types is not None:
            windowed = _windowed(types, layers)
        if not any(windowed):
            return {"window_size": None}
        if tokens is None:
            raise InputError("layer_types has sliding_attention, but use_sliding_window or sliding_window is off")
        frequency = None if all(windowed) else layer_frequency(str([int(layer) for layer in windowed]))
        return {"window_size": f"{tokens - 1},0", "window_attn_skip_freq": frequency}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the window and its layers in both spellings."""
        if architecture.window is None:
            return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": architecture.num_layers}
        layers, windowed = architecture.num_layers, windowed_layers(architecture)
        first = windowed.index(True) if True in windowed else layers
        return {
            "use_sliding_window": True,
            "sliding_window": architecture.window + 1,
            "max_window_layers": first,
            "layer_types": [SLIDING if layer else FULL for layer in windowed],
        }


def windowed_layers(architecture: NetworkArguments) -> list[bool]:
    """Whether each layer has a window."""
    frequency = numbers_of(architecture.window_attn_skip_freq)
    if architecture.window is None or frequency is None:
        return [architecture.window is not None] * architecture.num_layers
    if isinstance(frequency, int):
        return [(layer + 1) % frequency != 0 for layer in range(architecture.num_layers)]
    return [bool(layer) for layer in frequency]


def _windowed(types: object, layers: int) -> list[bool]:
    """Whether each layer has a window, from ``layer_types``."""
    if not isinstance(types, list) or len(types) != layers or any(name not in (FULL, SLIDING) for name in types):
        raise InputError(f"layer_types must say {FULL} or {SLIDING} for each of {layers} layers")
    return [name == SLIDING for name in types]
