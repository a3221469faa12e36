"""Model families: one file each, one line here, under the ``model_type`` of their ``config.json``."""

from collections.abc import Mapping
from typing import Any

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.ignored import IRRELEVANT, MUST_BE_OFF
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.errors import InputError

from .gemma import GEMMA
from .gpt_neox import GPT_NEOX
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .starcoder2 import STARCODER2

# in the order in which they are asked whether they can express an architecture
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, GEMMA, STARCODER2, GPT_NEOX)
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``.

    Raises:
        InputError: an architecture that is not in :data:`FAMILIES`, a quantised model, or an entry that this program
            does not understand.
    """
    known = f"known are {', '.join(family.architecture for family in FAMILIES.values())}"
    architectures = config.get("architectures") or []
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        name = ", ".join(map(str, architectures)) or f"model_type {config.get('model_type')!r}"
        raise InputError(f"{name} is not supported; {known}")
    if architectures and family.architecture not in architectures:
        raise InputError(f"{', '.join(map(str, architectures))} is not supported; {known}")
    if config.get("quantization_config") is not None:
        raise InputError("quantization_config: quantised weights cannot be converted; take the model they were made of")
    known_names = family.entry_names() | IRRELEVANT | {"quantization_config"}
    unknown = [
        name
        for name, value in config.items()
        if name not in known_names and value is not None and not (name in MUST_BE_OFF and not value)
    ]
    if unknown:
        raise InputError(
            f"{', '.join(sorted(unknown))}: not understood for {family.name}, and it may change what the model "
            "computes; if it does not, remove it"
        )
    return family


def family_for(architecture: NetworkArguments) -> Family:
    """The first family that can express an architecture.

    Raises:
        InputError: none can; with the reason of each.
    """
    objections = []
    for family in FAMILIES.values():
        objection = family.refuses(architecture)
        if objection is None:
            return family
        objections.append(f"{family.name}: {objection}")
    raise InputError(f"no Hugging Face family fits this architecture ({'; '.join(objections)})")
