"""The checkpoint that a run starts from is whole: its files are compared with their hashes before anything is loaded.

::

    newest of --load, a run folder    damaged: it is named, and the newest whole one before it is loaded
    any other checkpoint              damaged: the run is refused
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED
from mft_megatron.mcore.checkpointing.integrity.shared_verification import verify
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.run_folder.files import remedy
from mft_megatron.run_folder.found import earlier_checkpoint
from mft_megatron.run_folder.manifest import DamagedCheckpointError
from mft_megatron.run_folder.names import INFO
from mft_megatron.training.run_log import RunLog


def start_from_whole(
    arguments: Arguments, arguments_from: Callable[[CheckpointRef], Arguments] | None, log: RunLog
) -> Arguments:
    """Verify the checkpoints that a run loads, and choose an earlier one of its run folder if the newest is damaged.

    A collective of all ranks, which choose the same.

    Args:
        arguments: of the run.
        arguments_from: gives the arguments with another checkpoint; ``None``: no other one is chosen.
        log: takes a line for each checkpoint.

    Returns:
        the arguments with the checkpoint that is loaded.

    Raises:
        InputError: no whole checkpoint is left to start from, or the ranks find different ones.
    """
    level = arguments.checkpoint.verify_checkpoint
    _refuse_different(arguments)
    if arguments.resume is not None and not arguments.starts_from_hf:
        for problem in arguments.resume.instead_of:
            log.print(f"damaged: {problem}")
        chosen = _whole(arguments.resume, level, arguments_from is not None and _may_be_earlier(arguments), log)
        if arguments_from is not None and chosen != arguments.resume:
            arguments = _with_the_same_layout(arguments, arguments_from(chosen))
        if chosen.instead_of:
            log.print(f"{chosen.path} is the newest whole checkpoint; the run starts from it")
    if arguments.base is not None and not arguments.reads_hf and arguments.base.path != _path(arguments.resume):
        _whole(arguments.base, level, False, log)
    return arguments


def _whole(checkpoint: CheckpointRef, level: str, may_be_earlier: bool, log: RunLog) -> CheckpointRef:
    """Verify a checkpoint and, if an earlier one may be taken instead, those before it; returns the first whole one.

    Raises:
        InputError: there is none.
    """
    while True:
        try:
            log.print(verify(checkpoint.path, checkpoint.info, level))
            return checkpoint
        except DamagedCheckpointError as error:
            if not may_be_earlier:
                raise InputError(f"{error.problem}; {remedy(checkpoint.path, INFO)}", code=DAMAGED) from None
            problem, problems = error.problem, (*checkpoint.instead_of, error.problem)
        log.print(f"damaged: {problem}")
        earlier = earlier_checkpoint(checkpoint.path, problems) if process_groups.is_main() else None
        earlier = process_groups.object_from_main(earlier)
        if earlier is None:
            raise InputError(
                f"{problem}; no checkpoint in {checkpoint.path.parent} is whole: restore one from a copy, or "
                "start the run again with another --save folder",
                code=DAMAGED,
            )
        for problem in earlier.instead_of[len(problems) :]:
            log.print(f"damaged: {problem}")
        checkpoint = earlier


def _may_be_earlier(arguments: Arguments) -> bool:
    """Whether the run takes the newest checkpoint of a run folder, and not one that was asked for."""
    options, resume = arguments.checkpoint, arguments.resume
    if resume is None or options.load is None or options.ckpt_step is not None:
        return False
    return Path(options.load).resolve() == resume.path.parent.resolve()


def _with_the_same_layout(before: Arguments, arguments: Arguments) -> Arguments:
    """The arguments with an earlier checkpoint, whose parallel layout and seed the process groups have already.

    Raises:
        InputError: they are others.
    """
    if (before.distributed, before.initialization) != (arguments.distributed, arguments.initialization):
        raise InputError(
            f"{_path(before.resume)} is damaged, and {_path(arguments.resume)} before it is of another model or seed; "
            f"load that with --load {_path(arguments.resume)}",
            code=DAMAGED,
        )
    return arguments


def _refuse_different(arguments: Arguments) -> None:
    """Check that all ranks have found the same checkpoint; a collective.

    Raises:
        InputError: they have not.
    """
    own = None if arguments.resume is None else (str(arguments.resume.path), dataclasses.asdict(arguments.resume.info))
    of_main = process_groups.object_from_main(own)
    message = None
    if own != of_main:
        message = (
            f"a rank starts from {_path(arguments.resume) or 'no checkpoint'}, rank 0 from "
            f"{of_main[0] if of_main else 'no checkpoint'}: their nodes see different files; try again"
        )
    process_groups.raise_on_all_ranks(message)


def _path(checkpoint: CheckpointRef | None) -> Path | None:
    return None if checkpoint is None else checkpoint.path
