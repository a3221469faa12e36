"""The options of ``pretrain_mft.py``: read, completed and checked.

::

    command line, then --yaml-cfg FILE ─┐
    checkpoint's architecture ──────────┼─► Arguments ─► checks (no device, no process group) ─► training
    Megatron's defaults ────────────────┘

Whatever can be refused without a device is refused by :mod:`.checks`, in one line with the numbers and the remedy. The
help of an option says where it differs from Megatron's.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar

from mft_megatron.arguments.checks.batches import check_batch_schedule
from mft_megatron.arguments.checks.length import LENGTHS, check_length
from mft_megatron.arguments.checks.parallel_layout import check_virtual_stages
from mft_megatron.arguments.checks.ranges import check_ranges
from mft_megatron.arguments.checks.recompute import check_recompute_granularity
from mft_megatron.arguments.checks.table import CHECKS
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.groups.config_file import ConfigFileArguments
from mft_megatron.arguments.groups.lora import LoraArguments
from mft_megatron.arguments.groups.multi_task import MFTCODER_BALANCERS
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora
from mft_megatron.options import Given, build_parser, fill, missing_option, parse
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef

from .adapters import from_adapter, from_checkpoint
from .auto_resume import continue_own_run
from .completion import complete
from .config_file import read_config_file
from .megatron_only import MEGATRON_ONLY
from .start import Start, architecture_from, find_base, find_checkpoint, reads_adapter, seed_from
from .table import GROUPS, Arguments, from_pretrained
from .without_effect import option_without_effect

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    G = TypeVar("G", bound=DataclassInstance)
else:
    G = TypeVar("G")

TRAINING = {
    "prog": "pretrain_mft.py",
    "usage": "torchrun … pretrain_mft.py --data-path PREFIX (--train-iters N | --num-train-epochs E) --lr X "
    "--micro-batch-size N [options]",
    "description": "Multi-task fine-tuning on Megatron-Core. Start it with torchrun; option names, meanings and "
    "defaults are Megatron's unless the help says otherwise.",
}
PackedLengths = Callable[[str], Sequence[int]]
TrainingPacks = Callable[[str, int], int]


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The options that a command line and the file that it names give, by field.

    Attributes:
        given: the values.
        asked_for: fields that the user set. Of a file these are the values that differ from the defaults; none of a
            run's ``config.yaml``, which has a value for every option, including those without effect.
    """

    given: Given
    asked_for: Set[str]

    def group(self, group: type[G]) -> G:
        """One group of options; what is not given has its default."""
        return fill(group, self.given)


def parse_arguments(
    words: Sequence[str],
    world_size: int = 1,
    packed_lengths: PackedLengths | None = None,
    hf_model: CheckpointInfo | None = None,
    adapter: Lora | None = None,
    training_packs: TrainingPacks | None = None,
) -> Arguments:
    """Read, complete and check the command line of ``pretrain_mft.py``.

    Args:
        words: the words after the program's name.
        world_size: number of ranks, torchrun's ``WORLD_SIZE``.
        packed_lengths: function from a data prefix to the sequence lengths that it is packed for; called if
            ``--seq-length`` is not given.
        hf_model: description of the model of ``--hf-checkpoint``, if the run reads it.
        adapter: description of the adapter of ``--hf-adapter``, if the run reads it.
        training_packs: function from a data prefix and a sequence length to the packs of the training split; called
            for ``--num-train-epochs``.

    Raises:
        InputError: an unknown, misspelt, missing or contradictory option, or a ``--load`` without a checkpoint.
    """
    command_line = read_command_line(words)
    start = Start(find_checkpoint(command_line.group(CheckpointArguments)), hf_model, adapter)
    return make_arguments(command_line, start, world_size, packed_lengths, training_packs)


def read_command_line(
    words: Sequence[str], command: Mapping[str, str] = TRAINING, more: Iterable[tuple[str, type]] = ()
) -> CommandLine:
    """Read a command line and the file of ``--yaml-cfg``; the command line takes precedence.

    Args:
        words: after the program's name.
        command: program, usage and description, for ``--help``.
        more: groups of options, each with its title, that a command has beside those of training.

    Raises:
        InputError: an unknown option, or a missing or malformed value.
    """
    groups = (*more, ("configuration file", ConfigFileArguments), *GROUPS)
    parser = build_parser(groups, refused=MEGATRON_ONLY, **command)
    given = parse(parser, words, groups)
    asked_for = set(given)
    path = given.pop("yaml_cfg", None)
    if path is None:
        return CommandLine(*continue_own_run(given, asked_for))
    of_file, effective = read_config_file(path, GROUPS, MEGATRON_ONLY)
    if not effective:
        defaults = {field.name: field.default for _, group in GROUPS for field in dataclasses.fields(group)}
        asked_for |= {name for name, value in of_file.items() if value != defaults[name]}
    if any(name in given for name in LENGTHS):
        # the length of a run has two spellings, and the command line takes precedence
        of_file = {name: value for name, value in of_file.items() if name not in LENGTHS}
    return CommandLine(*continue_own_run({**of_file, **given}, asked_for))


def make_arguments(
    command_line: CommandLine,
    start: Start,
    world_size: int = 1,
    packed_lengths: PackedLengths | None = None,
    training_packs: TrainingPacks | None = None,
) -> Arguments:
    """Complete and check the options of a command line that has been read; see :func:`parse_arguments`."""
    given = dict(command_line.given)
    resume = start.resume(command_line.group(CheckpointArguments))
    if "seq_length" not in given and "data_path" in given and packed_lengths is not None:
        given["seq_length"] = only_packed_length(given["data_path"], packed_lengths(given["data_path"]))
    if resume is not None:
        given = {**architecture_from(resume, given), **given}
        weights_alone = given.get("finetune") or from_pretrained(resume, given.get("pretrained_checkpoint"))
        if not weights_alone:
            given["seed"] = seed_from(resume, given)
        given = {**given, **from_checkpoint(resume, given, weights_alone)}
    given = {**given, **_from_adapter(given, resume, start)}
    _refuse(missing_option(fill(group, given) for _, group in GROUPS))
    _expand_mftcoder_balancer(given)
    groups: dict[str, Any] = {
        field.name: fill(group, given) for field, (_, group) in zip(dataclasses.fields(Arguments), GROUPS, strict=False)
    }
    arguments = Arguments(**groups, world_size=world_size, resume=resume)
    _refuse(option_without_effect(arguments, command_line.asked_for))
    base = find_base(arguments.checkpoint, arguments.lora.peft_type, start)
    arguments = dataclasses.replace(arguments, base=base)
    # These checks come before completion, which computes with the numbers that they check, and again after it.
    for check in (check_length, check_ranges, check_recompute_granularity, check_virtual_stages, check_batch_schedule):
        _refuse(check(arguments))
    if arguments.training.num_train_epochs is not None:
        if training_packs is None:
            raise ValueError("--num-train-epochs: the packs of the data set are needed")
        packs = training_packs(arguments.data.data_path, arguments.data.seq_length)
        arguments = dataclasses.replace(arguments, epoch_packs=packs)
    arguments = complete(arguments)
    for check in CHECKS:
        _refuse(check(arguments))
    return arguments


def _refuse(problem: str | None) -> None:
    if problem:
        raise InputError(problem)


def _expand_mftcoder_balancer(given: Given) -> None:
    """Replace a value of ``--weighted_loss_mode`` such as coba by the loss and the balancer that it means."""
    balancer = MFTCODER_BALANCERS.get(given.get("mft_loss", ""))
    if balancer is None:
        return
    if given.get("task_balance", balancer) != balancer:
        raise InputError(
            f"the loss {given['mft_loss']} means --task-balance {balancer}, not {given['task_balance']}; leave one of "
            "them out"
        )
    given.update(mft_loss="task-token", task_balance=balancer)


def _from_adapter(given: Given, resume: CheckpointRef | None, start: Start) -> Given:
    """Options that follow from the adapter of ``--hf-adapter``, unless a checkpoint has adapters already."""
    lora = fill(LoraArguments, given)
    if lora.hf_adapter is None or not reads_adapter(lora, start.checkpoint):
        return {}
    if resume is None:
        raise InputError(
            f"--hf-adapter {lora.hf_adapter} belongs to a model: give it with --hf-checkpoint, --pretrained-checkpoint "
            "or --load"
        )
    if start.adapter is None:
        raise ValueError(f"--hf-adapter {lora.hf_adapter}: open the folder first")
    return from_adapter(lora.hf_adapter, start.adapter, given)


def only_packed_length(prefix: str, lengths: Sequence[int]) -> int:
    """Return the sequence length of a data set that is packed for one.

    Raises:
        InputError: it is packed for several, or for none.
    """
    if len(lengths) != 1:
        raise InputError(
            f"missing option: give --seq-length; {prefix} is packed for {', '.join(map(str, lengths)) or 'no length'}"
        )
    return lengths[0]
