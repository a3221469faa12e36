"""What a model family is: a table of weights and a table of configuration entries, each read in both directions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError

from .config_entries.entry import Config, Entry
from .config_entries.window import windowed_layers
from .row_layouts import Blocks, RowKind, Sizes, rows_of, rows_of_sources


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of the checkpoint and its Hugging Face names.

    ``{}`` in a name stands for the layer, ``{}`` after that for the expert. ``columns``: what they are counted by;
    ``None`` for a vector.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: RowKind
    columns: str | None = None

    @property
    def in_layers(self) -> bool:
        return self.ours.startswith("decoder.layers.")

    @property
    def in_experts(self) -> bool:
        return self.theirs[0].count("{}") > 1

    def blocks(self, sizes: Sizes) -> Blocks:
        return self.kind(sizes)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the Megatron-Core weight, of one layer and expert."""
        return (rows_of(self.kind(sizes)), *self._columns(sizes))

    def their_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """Of each Hugging Face weight."""
        return [(rows, *self._columns(sizes)) for rows in rows_of_sources(self.kind(sizes))]

    def stack(self, architecture: NetworkArguments) -> tuple[int, ...]:
        """Leading axes of the checkpoint's weight: layers, experts."""
        layers = (architecture.num_layers,) if self.in_layers else ()
        return (*layers, architecture.num_experts) if self.in_experts else layers

    def _columns(self, sizes: Sizes) -> tuple[int, ...]:
        return () if self.columns is None else (sizes[self.columns],)


@dataclasses.dataclass(frozen=True)
class Family:
    """``name``: for people. ``model_type``, ``architecture``: as in ``config.json``.

    ``rows(architecture)``: every weight of such a model. ``entries``: every entry of ``config.json`` that says
    something about the function of the model; others than these and ``config_entries.ignored.IRRELEVANT`` are refused.
    """

    name: str
    model_type: str
    architecture: str
    rows: Callable[[NetworkArguments], tuple[Row, ...]]
    entries: tuple[Entry, ...]

    def read_config(self, config: Config) -> NetworkArguments:
        """The architecture that ``config.json`` describes.

        Raises:
            InputError: an entry is missing, unknown, or says what cannot be expressed.
        """
        # fields differ in type
        fields: dict[str, Any] = {}
        for entry in self.entries:
            fields.update(entry.read(config))
        return NetworkArguments(**fields)

    def write_config(self, architecture: NetworkArguments) -> dict[str, object]:
        """The entries of ``config.json`` that describe ``architecture``, as far as this family can."""
        config: dict[str, object] = {"architectures": [self.architecture], "model_type": self.model_type}
        for entry in self.entries:
            config.update(entry.write(architecture))
        return config

    def refuses(self, architecture: NetworkArguments) -> str | None:
        """Why this family cannot express an architecture, or ``None``: what it would write says something else."""
        try:
            expressed = self.read_config(self.write_config(architecture))
        except InputError as error:
            return str(error)
        difference = first_difference(architecture, expressed)
        if difference is None:
            return None
        name, wanted, has = difference
        return f"{name} is {wanted}, {self.name} has {has}"

    def reads(self) -> set[str]:
        """Names of the entries of ``config.json`` that this family understands."""
        return {name for entry in self.entries for name in entry.names}


def comparable(architecture: NetworkArguments) -> dict[str, Any]:
    """What of an architecture makes its function: equal for models that compute the same."""
    content = dataclasses.asdict(architecture)
    for name in ("make_vocab_size_divisible_by", "group_query_attention", "max_position_embeddings"):
        del content[name]
    if architecture.num_experts is None:
        content = {name: value for name, value in content.items() if not name.startswith("moe_")}
    elif architecture.moe_ffn_hidden_size is None:
        content["moe_ffn_hidden_size"] = architecture.ffn_hidden_size
    content["window_attn_skip_freq"] = windowed_layers(architecture)
    content["window_size"] = architecture.window
    if architecture.swiglu:
        del content["openai_gelu"]
    return content


def first_difference(ours: NetworkArguments, theirs: NetworkArguments) -> tuple[str, Any, Any] | None:
    """The first entry in which two architectures differ in function: its name and both values."""
    here, there = comparable(ours), comparable(theirs)
    return next(((name, value, there.get(name)) for name, value in here.items() if there.get(name) != value), None)


def names_of(rows: Sequence[Row], architecture: NetworkArguments) -> set[str]:
    """Every Hugging Face weight of a model."""
    names: set[str] = set()
    for row in rows:
        for place in places(row, architecture):
            names.update(name.format(*place) for name in row.theirs)
    return names


def places(row: Row, architecture: NetworkArguments) -> list[tuple[int, ...]]:
    """Every (layer, expert) that a row has a weight of: ``()`` for one outside the layers."""
    found: list[tuple[int, ...]] = [()]
    for count in row.stack(architecture):
        found = [(*place, number) for place in found for number in range(count)]
    return found
