"""The newest checkpoint that a diverged run can continue from, and the error that names it."""

from collections.abc import Callable
from pathlib import Path

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DIVERGED
from mft_megatron.mcore.checkpointing.integrity.shared_verification import verify
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from mft_megatron.run_folder.found import described_checkpoints
from mft_megatron.run_folder.manifest import DamagedCheckpointError


def last_checkpoint(
    folder: Path, most: int, accepts: Callable[[CheckpointInfo], bool] = lambda info: True
) -> CheckpointRef | None:
    """The newest complete checkpoint of at most ``most`` steps in a run folder; ``None`` if there is none.

    Args:
        folder: the run folder.
        most: steps.
        accepts: whether a checkpoint with this description is wanted.
    """
    found = (one for one in described_checkpoints(folder) if one.info.iteration <= most and accepts(one.info))
    return max(found, key=lambda one: one.info.iteration, default=None)


def good_checkpoint(
    arguments: Arguments, most: int, of_this_run: Callable[[int], bool], say: Callable[[str], None]
) -> CheckpointRef | None:
    """The newest whole checkpoint of at most ``most`` steps that a run can go back to; a collective.

    Args:
        arguments: of the run.
        most: steps.
        of_this_run: whether the checkpoint of so many steps in ``--save`` is of this run's own past; one of another
            past may have the weights because of which the user resumed from before it.
        say: takes a line for each checkpoint that is compared with its hashes, as before a load.

    Returns:
        the checkpoint, the same on every rank; ``None`` without one.
    """
    folder = arguments.checkpoint.save

    def accepts(info: CheckpointInfo) -> bool:
        return info.has_optimizer and not info.is_converted and of_this_run(info.iteration)

    while folder is not None:
        found = last_checkpoint(Path(folder), most, accepts) if process_groups.is_main() else None
        found = process_groups.object_from_main(found)
        if found is None:
            return None
        try:
            say(verify(found.path, found.info, arguments.checkpoint.verify_checkpoint))
            return found
        except DamagedCheckpointError as error:
            say(f"damaged: {error.problem}")
            most = found.info.iteration - 1
    return None


def diverged(arguments: Arguments, what: str, most: int, options: str = "") -> InputError:
    """Make the error that ends a diverged run, the same on every rank; a collective.

    Args:
        arguments: of the run.
        what: what happened and what to change, in sentences without the last full stop.
        most: steps of the newest checkpoint that may be continued from: one whose weights had finite losses.
        options: to be added when continuing.
    """
    line = f"{what}, and {_continue_from(arguments, most, options)}" if process_groups.is_main() else None
    return InputError(process_groups.first_of_any_rank(line) or what, code=DIVERGED)


def _continue_from(arguments: Arguments, most: int, options: str) -> str:
    folder = arguments.checkpoint.save
    found = None if folder is None else last_checkpoint(Path(folder), most)
    if folder is not None and found is not None:
        newest = last_checkpoint(Path(folder), 10**9)
        earlier = newest is not None and newest.info.iteration > found.info.iteration
        step = f" --ckpt-step {found.info.iteration}" if earlier else ""
        because = ", since later ones have the weights that diverged" if earlier else ""
        return f"continue from {found.path} with --load {folder}{step}{options}{because}"
    resumed = arguments.resume
    if resumed is not None and not arguments.weights_alone and resumed.info.iteration <= most:
        return f"continue from {resumed.path} with --load {resumed.path}{options}"
    return f"start again{f' with{options}' if options else ''}: no checkpoint was saved before that"
