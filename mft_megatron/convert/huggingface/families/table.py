"""Every model family by the ``model_type`` of its ``config.json``: one file each, one line here."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.entry import Config
from mft_megatron.convert.huggingface.config_entries.ignored import IRRELEVANT, MAY_BE_OFF
from mft_megatron.convert.huggingface.config_entries.transformers_class import class_name, judge
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

# names classes in files beside a config.json
CODE = "auto_map"


def family_of(config: Config) -> Family:
    """Find the family of a ``config.json``.

    Raises:
        InputError: the architecture is not in :data:`FAMILIES`, the model is quantised, or an entry may change what the
            model computes and is not understood.
    """
    family = _named_family(config)
    if config.get("quantization_config") is not None:
        raise InputError("quantization_config: quantised weights cannot be converted; take the model they were made of")
    if refused := judge(family.model_type, _not_understood(config, family)).refused:
        raise InputError(
            f"{', '.join(refused)}: not understood for {family.name}, and it may change what the model "
            "computes; if it does not, remove it"
        )
    return family


def note_on_unread(config: Config, family: Family) -> str | None:
    """Name the entries that are not read because transformers does not read them either; ``None`` without any."""
    unread = judge(family.model_type, _not_understood(config, family)).unread
    sentences = []
    if others := [name for name in unread if name != CODE]:
        names = ", ".join(" ".join(name.split()) for name in others)
        sentences.append(f"{names}: not read, because transformers' {class_name(family.model_type)} has no such entry")
    if CODE in unread:
        sentences.append(
            f"{CODE}: names code of the model's own, which is not run; the model is computed as transformers' own "
            f"{family.architecture} is"
        )
    return "; ".join(sentences) or None


def _named_family(config: Config) -> Family:
    """The family that ``model_type`` and ``architectures`` name.

    Raises:
        InputError: one of them is not supported, or they contradict each other.
    """
    known = f"known are {', '.join(family.architecture for family in FAMILIES.values())}"
    listed, model_type = config.get("architectures"), config.get("model_type")
    architectures = list(map(str, listed)) if isinstance(listed, list) else [str(listed)] if listed else []
    listing = ", ".join(architectures)
    lowered = [name.casefold() for name in architectures]  # the first Llamas have LLaMAForCausalLM
    candidates = [family for family in FAMILIES.values() if family.architecture.casefold() in lowered]
    family = FAMILIES.get(str(model_type))
    if family is not None and (family in candidates or not architectures):
        return family
    if not candidates and (architectures or model_type is not None):
        raise InputError(f"{listing or f'model_type {model_type!r}'} is not supported; {known}")
    if model_type is None:
        wanted = candidates[0].model_type if candidates else "…"
        raise InputError(f'no model_type, and architectures says {listing or "nothing"}; add "model_type": "{wanted}"')
    raise InputError(
        f"model_type is {model_type!r}, but architectures says {listing}; correct the one that is of another model "
        f"({known})"
    )


def _not_understood(config: Config, family: Family) -> Config:
    understood = family.entry_names() | IRRELEVANT | {"quantization_config"}
    return {
        name: value
        for name, value in config.items()
        if name not in understood and not (name in MAY_BE_OFF and not value)
    }


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
