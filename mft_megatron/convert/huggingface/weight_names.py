"""Names of weights that a wrapper around the model has changed before they were stored.

::

    module.model.layers.0.…         DistributedDataParallel        model.layers.0._orig_mod.…     torch.compile
    base_model.model.model.layers.0.…     PEFT                     layers.0.…     the base model, without its head
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Set

# parts of a name that wrappers add, anywhere in it
_PARTS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "recomputation",
}
_PEFT = "base_model.model."
# parts of names of adapters that PEFT keeps beside the weights
_ADAPTERS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_", ".base_layer.", ".modules_to_save.")


@dataclasses.dataclass(frozen=True)
class Renaming:
    """Other names of stored weights.

    Attributes:
        names: the model's name of each stored weight, by the name that it is stored under.
        cause: the difference and its usual cause, in words.
    """

    names: Mapping[str, str]
    cause: str


def has_adapters(stored: Iterable[str]) -> bool:
    """Whether weights of adapters are among stored weights."""
    return any(part in name for name in stored for part in _ADAPTERS)


def wrappers_in(name: str) -> list[str]:
    """The wrappers whose parts a name has, in words."""
    return [owner for part, owner in _PARTS.items() if part in name.split(".")]


def find_renaming(stored: Collection[str], expected: Set[str], anchor: str) -> Renaming | None:
    """Find how to rename all stored weights alike, so that they have the model's names.

    Args:
        stored: names of the stored weights.
        expected: the model's names.
        anchor: one of ``expected`` that every model of the kind has.

    Returns:
        the renaming; ``None`` if nothing has to be renamed, or the difference is not the same in all names.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in _PARTS) for name in stored}
    before = missing = ""
    if anchor not in names.values():
        before = next((name[: -len(anchor)] for name in names.values() if name.endswith(f".{anchor}")), "")
        missing = next((anchor[: -len(name)] for name in names.values() if anchor.endswith(f".{name}")), "")
    if before:
        names = {name: short.removeprefix(before) for name, short in names.items()}
    elif missing:
        names = {name: short if short in expected else missing + short for name, short in names.items()}
    changed = sorted((renamed != anchor, name) for name, renamed in names.items() if name != renamed)
    if not changed or len(set(names.values())) < len(names) or anchor not in names.values():
        return None
    example = changed[0][1]
    by = wrappers_in(example) + (["PEFT"] if _PEFT in before else [])
    whom = f", as {' and '.join(by)} names it" if by else ""
    return Renaming(names, f"{names[example]} is stored as {example}{whom}")
