"""One weight of a checkpoint and the Hugging Face weights that it is made of."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from mft_megatron.arguments.groups.network import NetworkArguments

from .row_layouts import Blocks, RowLayout, Sizes, rows_of, rows_of_sources


@dataclasses.dataclass(frozen=True)
class MappedWeight:
    """A line of a family's table of weights; it stands for the weight in every layer and expert.

    Attributes:
        name: name in a Megatron-Core checkpoint, where layers and experts are stacked.
        hf_names: names in a Hugging Face folder, with ``{}`` for the layer and a second ``{}`` for the expert.
        layout: order of the Hugging Face weights' rows in the checkpoint's weight.
        columns: key of the number of columns in ``Sizes``; ``None`` for a vector.
    """

    name: str
    hf_names: tuple[str, ...]
    layout: RowLayout
    columns: str | None = None

    @property
    def in_layers(self) -> bool:
        """Whether each layer has such a weight."""
        return self.name.startswith("decoder.layers.")

    @property
    def in_experts(self) -> bool:
        """Whether each expert has such a weight."""
        return self.hf_names[0].count("{}") > 1

    def blocks(self, sizes: Sizes) -> Blocks:
        """Blocks of Hugging Face rows, in the order of the checkpoint's rows."""
        return self.layout(sizes)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the checkpoint's weight, of one layer and expert."""
        return (rows_of(self.layout(sizes)), *self._columns(sizes))

    def hf_shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        """Shape of each Hugging Face weight."""
        return [(rows, *self._columns(sizes)) for rows in rows_of_sources(self.layout(sizes))]

    def stack(self, architecture: NetworkArguments) -> tuple[int, ...]:
        """Leading axes of the checkpoint's weight: layers, experts."""
        layers = (architecture.num_layers,) if self.in_layers else ()
        return (*layers, architecture.num_experts or 0) if self.in_experts else layers

    def indices(self, architecture: NetworkArguments) -> Iterator[tuple[int, ...]]:
        """Every index in the stack: ``(layer, expert)``, ``(layer,)``, or only ``()`` outside the layers."""
        return itertools.product(*map(range, self.stack(architecture)))

    def hf_names_at(self, index: tuple[int, ...]) -> list[str]:
        """Names of the Hugging Face weights of one layer and expert."""
        return [name.format(*index) for name in self.hf_names]

    def _columns(self, sizes: Sizes) -> tuple[int, ...]:
        return () if self.columns is None else (sizes[self.columns],)


def names_of(weights: Iterable[MappedWeight], architecture: NetworkArguments) -> set[str]:
    """Names of every Hugging Face weight of a model."""
    return {name for weight in weights for index in weight.indices(architecture) for name in weight.hf_names_at(index)}
