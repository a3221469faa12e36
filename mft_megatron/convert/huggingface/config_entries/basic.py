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
    """Biases in all linear layers or in none, given by several flags that must agree."""

    def __init__(self, *names: str, default: bool = False):
        self.names = names
        self._default = default

    def read(self, config: Config) -> Fields:
        """Read the flags; raise ``InputError`` where they differ."""
        values = {name: flag(config, name, self._default) for name in self.names}
        if len(set(values.values())) > 1:
            listed = " and ".join(f"{name} {str(value).lower()}" for name, value in values.items())
            raise InputError(f"{listed}: biases in some linear layers and not in others cannot be expressed")
        return {"add_bias_linear": values[self.names[0]]}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write every flag."""
        return dict.fromkeys(self.names, architecture.add_bias_linear)


class Vocabulary:
    """The vocabulary size, which is not part of an architecture: the conversion reads and writes it."""

    names = ("vocab_size",)

    def read(self, config: Config) -> Fields:
        """Set no field."""
        return {}

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write nothing."""
        return {}
