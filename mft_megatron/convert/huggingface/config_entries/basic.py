"""Entries with one value each: fixed, a number, or a flag."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError

from .entry import REQUIRED, Config, Fields, Required, flag, real_number, whole_number


class Fixed:
    """Fields that are the same in the whole family and have no entry in ``config.json``."""

    names = ()

    def __init__(self, **fields: object):
        self._fields = fields

    def read(self, config: Config) -> Fields:
        """Return the fields."""
        return self._fields

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write nothing."""
        return {}


class Only:
    """An entry that must have one meaning, spelled as any of some values, the first of which is written."""

    def __init__(self, name: str, *values: object, absent: object = REQUIRED):
        """Set the allowed values.

        Args:
            absent: the value that a missing entry stands for; by default the first of ``values``.
        """
        self.names = (name,)
        self._values = values
        self._absent = values[0] if absent is REQUIRED else absent

    def read(self, config: Config) -> Fields:
        """Check the entry; it sets no field."""
        value = config.get(self.names[0], self._absent)
        # 0 is not False, nor 1 True
        if not any(value == allowed and type(value) is type(allowed) for allowed in self._values):
            raise InputError(
                f"{self.names[0]} is {value!r}, which this program cannot express; only {self._values[0]!r}"
            )
        return {}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the first of the allowed values."""
        return {self.names[0]: self._values[0]}


class WholeNumber:
    """A positive whole number under another name."""

    def __init__(self, field: str, name: str, default: int | Required = REQUIRED):
        self.names = (name,)
        self._field, self._default = field, default

    def read(self, config: Config) -> Fields:
        """Read the number."""
        return {self._field: whole_number(config, self.names[0], self._default)}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the number."""
        return {self.names[0]: getattr(architecture, self._field)}


class RealNumber:
    """A number above 0 under another name."""

    def __init__(self, field: str, name: str, default: float):
        self.names = (name,)
        self._field, self._default = field, default

    def read(self, config: Config) -> Fields:
        """Read the number."""
        return {self._field: real_number(config, self.names[0], self._default)}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the number."""
        return {self.names[0]: getattr(architecture, self._field)}


class Flag:
    """An entry that is true or false, under another name."""

    def __init__(self, field: str, name: str, default: bool):
        self.names = (name,)
        self._field, self._default = field, default

    def read(self, config: Config) -> Fields:
        """Read the flag."""
        return {self._field: flag(config, self.names[0], self._default)}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the flag."""
        return {self.names[0]: getattr(architecture, self._field)}


class Biases:
    """Biases in the linear layers of attention and in those of the MLP: a flag for each, or one for both."""

    def __init__(self, attention: str, mlp: str | bool, default: bool = False):
        """Name the flags.

        Args:
            attention: flag of the linear layers of attention.
            mlp: flag of those of the MLP, or whether the whole family has biases there.
            default: value of a missing flag.
        """
        self.names = tuple(dict.fromkeys(name for name in (attention, mlp) if isinstance(name, str)))
        self._attention, self._mlp, self._default = attention, mlp, default

    def read(self, config: Config) -> Fields:
        """Read the flags."""
        attention = flag(config, self._attention, self._default)
        mlp = flag(config, self._mlp, self._default) if isinstance(self._mlp, str) else self._mlp
        return {
            "add_bias_linear": attention and mlp,
            "add_attention_bias": attention and not mlp,
            "add_mlp_bias": mlp and not attention,
        }

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the flags."""
        mlp = {self._mlp: architecture.mlp_bias} if isinstance(self._mlp, str) else {}
        return {**mlp, self._attention: architecture.attention_bias}


class Vocabulary:
    """The vocabulary size, which is not part of an architecture: the conversion reads and writes it."""

    names = ("vocab_size",)

    def read(self, config: Config) -> Fields:
        """Set no field."""
        return {}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write nothing."""
        return {}
