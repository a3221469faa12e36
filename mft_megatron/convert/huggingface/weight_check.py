"""Comparison of the weights in a Hugging Face folder with the architecture of its ``config.json``."""

import dataclasses
import re
from collections.abc import Sequence

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.vocabulary import EMBEDDING, OUTPUT_LAYER

from .family import Family
from .mapped_weight import names_of
from .row_layouts import sizes_of
from .safetensors_reader import WeightFiles, same_content
from .weight_names import Renaming, find_renaming, has_adapters

# Beginnings of the names of heads that reward models and classifiers have beside the output layer.
HEADS = ("v_head.", "value_head.", "reward_head.", "regression_head.", "score.", "classifier.")


def refuse_mismatch(files: WeightFiles, family: Family, architecture: NetworkArguments, vocab_size: int) -> None:
    """Check that a folder holds exactly the weights of its architecture.

    Raises:
        InputError: a weight is missing, unknown, or of another shape.
    """
    mapped, sizes = family.weights(architecture), sizes_of(architecture, vocab_size)
    expected = names_of(mapped, architecture)
    if has_adapters(files.weights):
        raise InputError(
            f"{files.folder}: holds adapters of PEFT beside the weights, which are not merged; save the model after "
            "merge_and_unload(), or save the adapter alone and give it to merge-lora"
        )
    if missing := expected - files.weights.keys():
        raise InputError(f"{files.folder}: {_why_missing(files, family, architecture, missing)}")
    unknown = files.weights.keys() - expected
    if architecture.tie_embeddings:
        unknown -= _tied_outputs(files, family, architecture)
    if unknown:
        raise InputError(f"{files.folder}: {_some(sorted(unknown))} {_why_unknown(family, architecture, unknown)}")
    for weight in mapped:
        for index in weight.indices(architecture):
            for name, shape in zip(weight.hf_names_at(index), weight.hf_shapes(sizes), strict=True):
                stored = files.weights[name].shape
                if stored != shape:
                    raise InputError(
                        f"{files.folder}: {name} has the shape {list(stored)}, config.json says {list(shape)}; they "
                        "are of different models"
                    )


def renaming_of(files: WeightFiles, family: Family, architecture: NetworkArguments) -> Renaming | None:
    """The renaming after which a folder holds exactly the weights of its architecture; ``None`` without one."""
    mapped = family.weights(architecture)
    expected, (anchor,) = names_of(mapped, architecture), mapped[0].hf_names
    renaming = find_renaming(files.weights, expected, anchor)
    return renaming if renaming is not None and expected <= set(renaming.names.values()) else None


def _why_missing(files: WeightFiles, family: Family, architecture: NetworkArguments, missing: set[str]) -> str:
    """Why weights are missing, by the usual causes, and what to do."""
    mapped = family.weights(architecture)
    expected, (anchor,) = names_of(mapped, architecture), mapped[0].hf_names
    if renaming := find_renaming(files.weights, expected, anchor):
        if left := sorted(expected - set(renaming.names.values())):
            return f"{renaming.cause}, and so are the others, but {_some(left)} missing; save the whole model again"
        return (
            f"{renaming.cause}, and so are all others, where servers do not find them; hf-to-mcore and --hf-checkpoint "
            "read them, and what they export has the usual names"
        )
    output = next((weight.hf_names[0] for weight in mapped if weight.name == OUTPUT_LAYER), None)
    if missing == {output}:
        return (
            f"{output} is missing; if the output layer is the embedding, set tie_word_embeddings to true in "
            "config.json, otherwise download the model again"
        )
    layers: dict[int, set[str]] = {}
    for weight in mapped:
        for index in weight.indices(architecture) if weight.in_layers else ():
            layers.setdefault(index[0], set()).update(weight.hf_names_at(index))
    absent = {layer: names for layer, names in layers.items() if names <= missing}
    if absent and missing == set().union(*absent.values()):
        return (
            f"config.json says num_hidden_layers {architecture.num_layers}, and there are no weights of layer "
            f"{', '.join(map(str, absent))}; correct it, or download the missing files"
        )
    return f"{_some(sorted(missing))} missing, which config.json asks for; correct it, or download the model again"


def _why_unknown(family: Family, architecture: NetworkArguments, unknown: set[str]) -> str:
    """Why weights are not known, by the usual causes, and what to do; follows their names and "are"."""
    flags = sorted(name for name in family.entry_names() if name.endswith("_bias"))
    if flags and all(name.endswith(".bias") for name in unknown):
        return f"stored, and config.json says that there are none; set {' and '.join(flags)} to what the model has"
    layers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in unknown}
    if all(match is not None and int(match[1]) >= architecture.num_layers for match in layers.values()):
        return f"stored, and config.json says num_hidden_layers {architecture.num_layers}; correct it"
    if all(name.startswith(HEADS) for name in unknown):
        return "of a head for another task, which would be lost; save the model without it"
    return "not known in this architecture; the model is of another one"


def _tied_outputs(files: WeightFiles, family: Family, architecture: NetworkArguments) -> set[str]:
    """Output layers that a folder stores although they are the embedding's weight.

    Raises:
        InputError: the output layer is not the embedding's weight.
    """
    untied = family.weights(dataclasses.replace(architecture, tie_embeddings=False))
    hf_names = {weight.name: weight.hf_names for weight in untied}
    embedding = hf_names[EMBEDDING][0]
    stored = {name for name in hf_names[OUTPUT_LAYER] if name in files.weights}
    for output in stored:
        if not same_content(files, output, files, embedding):
            raise InputError(
                f"{files.folder}: config.json ties the embeddings, but {output} differs from {embedding}; set "
                "tie_word_embeddings to what the model was trained with"
            )
    return stored


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"
