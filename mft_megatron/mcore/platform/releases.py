"""Differences between supported releases of Megatron-Core that are no faults, each handled by capability.

Faults are handled in :mod:`.megatron_fixes`; which releases are supported is in :mod:`.versions`.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any


def submodules_of(spec: Any) -> Any:
    """The submodules in a module's specification, to be changed in place.

    Since 0.18 those of MLPs and experts are ``functools.partial`` of the module's class instead of a ``ModuleSpec``.
    """
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def accepted(function: Callable[..., object], **options: object) -> dict[str, object]:
    """The options among these that this release's function has as parameters."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


# by logger: advice of Megatron-Core's developers to each other, which a user of this package cannot follow
_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.common": "_common is deprecated",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
}


def silence_notices() -> None:
    """Drop deprecation notices of newer Megatron-Core releases from the log."""
    for name, words in _NOTICES.items():
        logging.getLogger(name).addFilter(functools.partial(_lacks, words))


def _lacks(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()
