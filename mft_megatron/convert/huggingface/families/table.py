"""Every model family by the ``model_type`` of its ``config.json``: one file each, one line here."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.entry import Config
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

# a model that did not come from Hugging Face is exported as the first of these that can express it
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, GEMMA, STARCODER2, GPT_NEOX)
}


def family_of(config: Config) -> Family:
    """Find the family of a ``config.json``.

    Raises:
        InputError: the architecture is not in :data:`FAMILIES`, the model is quantised, or an entry is not understood.
    """
    known = f"known are {', '.join(family.architecture for family in FAMILIES.values())}"
    listed, model_type = config.get("architectures"), config.get("model_type")
    architectures = list(map(str, listed)) if isinstance(listed, list) else [str(listed)] if listed else []
    family = FAMILIES.get(str(model_type))
    if family is None:
        name = ", ".join(architectures) or f"model_type {model_type!r}"
        raise InputError(f"{name} is not supported; {known}")
    if architectures and family.architecture not in architectures:
        raise InputError(f"{', '.join(architectures)} is not supported; {known}")
    if config.get("quantization_config") is not None:
        raise InputError("quantization_config: quantised weights cannot be converted; take the model they were made of")
    understood = family.entry_names() | IRRELEVANT | {"quantization_config"}
    unknown = [
        name
        for name, value in config.items()
        if name not in understood and value is not None and not (name in MUST_BE_OFF and not value)
    ]
    if unknown:
        raise InputError(
            f"{', '.join(sorted(unknown))}: not understood for {family.name}, and it may change what the model "
            "computes; if it does not, remove it"
        )
    return family


def family_for(architecture: NetworkArguments) -> Family:
    """Find the first family that can express an architecture.

    Raises:
        InputError: no family can; the message has the reason of each.
    """
    objections = []
    for family in FAMILIES.values():
        objection = family.refuses(architecture)
        if objection is None:
            return family
        objections.append(f"{family.name}: {objection}")
    raise InputError(f"no Hugging Face family fits this architecture ({'; '.join(objections)})")
