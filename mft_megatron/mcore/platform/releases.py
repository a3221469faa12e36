"""Differences between supported releases of Megatron-Core that are no faults, each met by capability.

Faults are met in :mod:`.megatron_fixes`; which releases are supported is in :mod:`.versions`.
"""

import functools
import inspect
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
