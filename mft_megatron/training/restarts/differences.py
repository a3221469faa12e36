"""Differences between a run that resumes and the run that was saved: options, ranks and versions, in words."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.arguments.table import GROUPS, Arguments
from mft_megatron.options import spelling
from mft_megatron.run_folder.description import CheckpointInfo

# packages whose release may change numbers
PACKAGES = ("mft-megatron", "torch", "megatron-core", "transformer-engine", "flash-attn", "apex")
# options that change no number of a run: where it writes, what it logs, when it ends
WITHOUT_CONSEQUENCE = frozenset(
    {
        *(field.name for field in dataclasses.fields(LoggingArguments)),
        *(field.name for field in dataclasses.fields(CheckpointArguments)),
        *("data_path", "tokenizer_model", "tokenizer_type", "hf_adapter"),
        *("exit_interval", "exit_duration_in_mins", "exit_signal_handler", "exit_signal"),
        *("distributed_timeout_minutes", "stall_timeout", "start_timeout"),
        *("manual_gc", "manual_gc_interval", "manual_gc_eval"),
    }
) - {"load_optim", "load_rng"}
_ABSENT = object()
BATCH_SIZES = ("global_batch_size", "rampup_batch_size", "step_batch_size_schedule")


def options_of(arguments: Arguments) -> dict[str, Any]:
    """The options of a run that change its numbers, and its number of ranks, as JSON gives them back."""
    options = {name: value for name, value in arguments.as_options().items() if name not in WITHOUT_CONSEQUENCE}
    content: dict[str, Any] = json.loads(json.dumps({**options, "world_size": arguments.world_size}, default=str))
    return content


def versions() -> dict[str, str]:
    """Releases of Python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest_of_options(arguments: Arguments) -> str:
    """Digest of the options that change numbers and of the releases of packages, in hex."""
    content = json.dumps([options_of(arguments), versions()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def differences(arguments: Arguments, info: CheckpointInfo) -> list[str]:
    """List in words what a run that resumes does otherwise than the one that saved the checkpoint.

    Args:
        arguments: of the run that resumes.
        info: description of the checkpoint; before format version 4 it has some of the options, and no versions.
    """
    now = options_of(arguments)
    before = info.options or _known_options(info)
    found = list(_differing_options(before, now, complete=bool(info.options)))
    current = versions()
    for name in sorted(info.versions.keys() | current.keys()) if info.versions else ():
        was, is_now = info.versions.get(name), current.get(name)
        if was != is_now:
            found.append(f"{name} {is_now or 'not installed'} (was {was or 'not installed'})")
    if not info.options:
        found.append("the checkpoint is of an earlier version and does not say its other options")
    return found


def same_options(arguments: Arguments, info: CheckpointInfo) -> bool:
    """Whether a run has the options of the one that saved a checkpoint, which says them, on any number of ranks."""
    now = {**options_of(arguments), "world_size": info.options.get("world_size")}
    return bool(info.options) and not list(_differing_options(info.options, now, complete=True))


def batch_explanation(arguments: Arguments, info: CheckpointInfo) -> str | None:
    """Explain what another batch size means for a run that resumes; ``None`` where it is the same."""
    now, before = options_of(arguments), info.options or _known_options(info)
    if all(now[name] == before.get(name, now[name]) for name in BATCH_SIZES):
        return None
    return (
        f"another batch size: the {info.consumed_samples:,} packs that are consumed stay consumed, and the next step "
        "begins with the pack after them, in the same order: every pack is used once in an epoch as before. Schedules "
        "of learning rate and weight decay go on counting steps"
    )


def _differing_options(before: Mapping[str, Any], now: Mapping[str, Any], complete: bool) -> Iterator[str]:
    fields = {field.name: field for _, group in GROUPS for field in dataclasses.fields(group)}
    for name, field in fields.items():
        if name in WITHOUT_CONSEQUENCE or before.get(name, _ABSENT) == now.get(name, _ABSENT):
            continue
        if name not in before and (not complete or now[name] == field.default):
            continue  # an option that the earlier version did not have
        was, value = before.get(name), now.get(name)
        if isinstance(field.default, bool):
            was, value = ("given" if state not in (None, field.default) else "not given" for state in (was, value))
        yield f"{spelling(field)} {_word(value)} (was {_word(was)})"
    if now["world_size"] != before.get("world_size", now["world_size"]):
        yield f"{now['world_size']} rank(s) (was {before['world_size']})"


def _word(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _known_options(info: CheckpointInfo) -> dict[str, Any]:
    """Options that descriptions of earlier versions have."""
    sizes = {
        "tensor_model_parallel_size": "tensor",
        "pipeline_model_parallel_size": "pipeline",
        "context_parallel_size": "context",
        "expert_model_parallel_size": "expert",
        "world_size": "world",
    }
    return {
        "global_batch_size": info.global_batch_size,
        "bf16": info.precision == "bf16",
        "fp16": info.precision == "fp16",
        "use_distributed_optimizer": info.distributed_optimizer,
        "mft_normalization": info.mft_normalization,
        **{option: info.layout[name] for option, name in sizes.items() if name in info.layout},
    }
