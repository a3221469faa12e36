"""Entries for the activation function of the MLP."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError

from .entry import Config, Fields

# Names that transformers has for each function; the first is written.
SILU = ("silu", "swish")
GELU = ("gelu", "gelu_python")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate")


class Gelu:
    """GELU, exact or by its tanh approximation."""

    def __init__(self, name: str):
        self.names = (name,)

    def read(self, config: Config) -> Fields:
        """Read the function's name."""
        value = config.get(self.names[0], GELU[0])
        if value not in GELU + TANH_GELU:
            raise InputError(
                f"{self.names[0]} is {value!r}; only {' or '.join(GELU)}, and the tanh approximation "
                f"({', '.join(TANH_GELU)}) can be expressed"
            )
        return {"openai_gelu": value in TANH_GELU}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the function's name."""
        return {self.names[0]: TANH_GELU[0] if architecture.openai_gelu else GELU[0]}


class TanhGelu:
    """Gemma's activation function: GELU by its tanh approximation, which published configurations also call "gelu".

    transformers 4 reads ``hidden_activation`` literally, and takes the approximation where that is missing or null;
    transformers 5 reads ``hidden_act`` and takes "gelu" for the approximation. A configuration is accepted where both
    versions use the approximation.
    """

    def __init__(self, name: str, name_in_4: str):
        """Name the entries.

        Args:
            name: entry that transformers 5 reads.
            name_in_4: entry that transformers 4 reads.
        """
        self.names = (name, name_in_4)

    def read(self, config: Config) -> Fields:
        """Check both entries."""
        for name, allowed in zip(self.names, ((*TANH_GELU, "gelu"), (*TANH_GELU, None)), strict=True):
            value = config.get(name, TANH_GELU[0])
            if value not in allowed:
                raise InputError(
                    f"{name} is {value!r}, which this program cannot express in this family; only {TANH_GELU[0]!r}"
                )
        return {"openai_gelu": True}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the approximation's name to both entries."""
        return dict.fromkeys(self.names, TANH_GELU[0])
