"""The options of ``pretrain_mft.py``, read, completed and checked.

::

    command line, then --yaml-cfg FILE ─┐
    checkpoint's architecture ──────────┼─► Arguments ─► check (no device, no process group) ─► training
    Megatron's defaults ────────────────┘

What can be refused without a device is refused by :mod:`.checks`, in one line that names the numbers and the
remedy. Where an option differs from Megatron's, its help says so.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mft_megatron.arguments.checks.batches import check_batch_schedule
from mft_megatron.arguments.checks.parallel_layout import check_virtual_stages
from mft_megatron.arguments.checks.ranges import check_ranges
from mft_megatron.arguments.checks.recompute import check_recompute_granularity
from mft_megatron.arguments.checks.table import CHECKS
from mft_megatron.arguments.groups.config_file import ConfigFileArguments
from mft_megatron.arguments.groups.data import DataArguments
from mft_megatron.arguments.groups.multi_task import MFTCODER_BALANCERS
from mft_megatron.errors import InputError
from mft_megatron.options import build_parser, fill, missing_option, parse
from mft_megatron.run_folder import CheckpointRef

from .adapters import from_adapter, from_checkpoint
from .completion import complete
from .config_file import read_config_file
from .megatron_only import MEGATRON_ONLY
from .start import architecture_from, find_base, find_checkpoint, seed_from
from .table import GROUPS, Arguments, from_pretrained
from .without_effect import option_without_effect


def parse_arguments(
    command_line: Sequence[str],
    world_size: int = 1,
    packed_lengths: Any = None,
    describe_hf: Any = None,
    describe_adapter: Any = None,
) -> Arguments:
    """Read, complete and check the command line of ``pretrain_mft.py``.

    Args:
        command_line: the words after the program's name.
        world_size: number of ranks, torchrun's ``WORLD_SIZE``.
        packed_lengths: function from a data prefix to the sequence lengths it is packed for; used where
            ``--seq-length`` is not given.
        describe_hf: function from a Hugging Face folder to its :class:`CheckpointInfo`; used with ``--hf-checkpoint``.
        describe_adapter: function from a PEFT folder and the description of its model to a :class:`.lora.Lora`; used
            with ``--hf-adapter``.

    Raises:
        InputError: an unknown, misspelt, missing or contradictory option, or a ``--load`` without a checkpoint.
    """
    given, asked_for = _read(command_line)
    resume = find_checkpoint(given, describe_hf)
    _refuse(missing_option([fill(DataArguments, {"seq_length": 0, **given})]))
    if "seq_length" not in given and packed_lengths is not None:
        given["seq_length"] = _only_packed_length(given["data_path"], packed_lengths(given["data_path"]))
    if resume is not None:
        given = {**architecture_from(resume, given), **given}
        weights_alone = given.get("finetune") or from_pretrained(resume, given.get("pretrained_checkpoint"))
        if not weights_alone:
            given["seed"] = seed_from(resume, given)
        given = {**given, **from_checkpoint(resume, given, weights_alone)}
    given = {**given, **_from_adapter(given, resume, describe_adapter)}
    _refuse(missing_option(fill(group, given) for _, group in GROUPS))
    _expand_mftcoder_balancer(given)
    _refuse(option_without_effect(given, asked_for))
    groups = {
        field.name: fill(group, given) for field, (_, group) in zip(dataclasses.fields(Arguments), GROUPS, strict=False)
    }
    base = find_base(given, resume, describe_hf)
    arguments = Arguments(**groups, world_size=world_size, resume=resume, base=base)
    # before anything is derived from these numbers; again below for the derived ones
    for check in (check_ranges, check_recompute_granularity, check_virtual_stages, check_batch_schedule):
        _refuse(check(arguments))
    arguments = complete(arguments)
    for check in CHECKS:
        _refuse(check(arguments))
    return arguments


def _read(command_line: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """What the command line and the file it names give, and the fields that somebody asked for.

    What a file says beyond a default is asked for, but for what stands in a run's own ``config.yaml``: there every
    option has a value, those that have no effect, too.
    """
    groups = (("configuration file", ConfigFileArguments), *GROUPS)
    parser = build_parser(
        groups,
        prog="pretrain_mft.py",
        usage="torchrun … pretrain_mft.py --data-path PREFIX --train-iters N --lr X --micro-batch-size N [options]",
        description="Multi-task fine-tuning on Megatron-Core. Start it with torchrun; option names, meanings and "
        "defaults are Megatron's unless the help says otherwise.",
        refused=MEGATRON_ONLY,
    )
    given = parse(parser, command_line, groups)
    asked_for = set(given)
    path = given.pop("yaml_cfg", None)
    if path is None:
        return given, asked_for
    of_file, effective = read_config_file(path, GROUPS, MEGATRON_ONLY)
    if not effective:
        defaults = {field.name: field.default for _, group in GROUPS for field in dataclasses.fields(group)}
        asked_for |= {name for name, value in of_file.items() if value != defaults[name]}
    return {**of_file, **given}, asked_for


def _refuse(problem: str | None) -> None:
    if problem:
        raise InputError(problem)


def _expand_mftcoder_balancer(given: dict[str, Any]) -> None:
    """``--weighted_loss_mode coba``: a loss and a balancer in one value."""
    balancer = MFTCODER_BALANCERS.get(given.get("mft_loss"))
    if balancer is None:
        return
    if given.get("task_balance", balancer) != balancer:
        raise InputError(
            f"the loss {given['mft_loss']} means --task-balance {balancer}, not {given['task_balance']}; leave one of "
            "them out"
        )
    given.update(mft_loss="task-token", task_balance=balancer)


def _from_adapter(given: Mapping[str, Any], resume: CheckpointRef | None, describe_adapter: Any) -> dict[str, Any]:
    """Options that follow from the adapter of ``--hf-adapter``, unless a checkpoint has adapters already."""
    folder = given.get("hf_adapter")
    if folder is None or (resume is not None and resume.info.lora is not None):
        return {}
    if resume is None:
        raise InputError(
            f"--hf-adapter {folder} belongs to a model: give it with --hf-checkpoint, --pretrained-checkpoint or --load"
        )
    return from_adapter(folder, describe_adapter(folder, resume.info), given)


def _only_packed_length(prefix: str, lengths: Sequence[int]) -> int:
    if len(lengths) != 1:
        raise InputError(
            f"missing option: give --seq-length; {prefix} is packed for {', '.join(map(str, lengths)) or 'no length'}"
        )
    return lengths[0]
