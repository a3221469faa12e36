"""Multi-task fine-tuning on Megatron-Core.

    torchrun --nproc-per-node 4 pretrain_mft.py --data-path PREFIX --save DIR <Megatron arguments> --mft-loss task-token

See ``--help`` for all options, and README.md for a whole run.
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mft_megatron import launcher, parent_process
from mft_megatron.errors import InputError, run_command

if TYPE_CHECKING:
    from mft_megatron.arguments.command import CommandLine
    from mft_megatron.arguments.table import Arguments
    from mft_megatron.convert.background_export import Exports
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.convert.peft.weight_source import AdapterSource
    from mft_megatron.run_folder.description import CheckpointRef
    from mft_megatron.run_folder.owner.owner import Owner
    from mft_megatron.training.restarts.endings import Ending


def main() -> int | None:
    """Check every option first; only then load torch and start process groups."""
    parent_process.end_with_launcher(os.environ)
    from mft_megatron.arguments.auto_resume import advice_of_own_run
    from mft_megatron.arguments.command import read_command_line
    from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
    from mft_megatron.arguments.groups.dry_run import DRY_RUN, DryRunArguments, refuse_without_dry_run
    from mft_megatron.arguments.groups.validation import ValidationArguments
    from mft_megatron.run_folder.owner.owner import Owner
    from mft_megatron.training.restarts.endings import exit_code_of, supervised

    command_line = read_command_line(sys.argv[1:], more=DRY_RUN)
    if command_line.group(DryRunArguments).dry_run:
        from mft_megatron.dry_run.command import dry_run

        return dry_run(command_line)
    refuse_without_dry_run(command_line.asked_for)
    launcher.complete(os.environ)
    main_rank = os.environ.get("RANK", "0") == "0"
    save = command_line.group(CheckpointArguments).save
    # a run that only evaluates has no outcome
    folder = None if command_line.group(ValidationArguments).skip_train else save
    advice = advice_of_own_run(command_line.given)
    with Owner(save or ".") as owner, supervised(folder, main_rank), advice:
        ending = run(command_line, main_rank, owner)
        return exit_code_of(ending, folder, main_rank)


def run(command_line: "CommandLine", main_rank: bool, owner: "Owner") -> "Ending":
    """Complete and check every option, and train."""
    from mft_megatron.arguments.checks.lora import check_trained_model
    from mft_megatron.arguments.command import make_arguments
    from mft_megatron.convert.run_start import open_start
    from mft_megatron.data.loading.dataset import packed_lengths, training_packs

    command_line = of_finished_run(command_line) or command_line
    start, model, adapter = open_start(command_line)
    world_size = int(os.environ.get("WORLD_SIZE", 1))

    def arguments_from(checkpoint: "CheckpointRef | None") -> "Arguments":
        from_it = dataclasses.replace(start, checkpoint=checkpoint)
        arguments = make_arguments(command_line, from_it, world_size, packed_lengths, training_packs)
        if problem := check_trained_model(arguments):
            raise InputError(problem)
        return arguments

    arguments = arguments_from(start.checkpoint)
    train = functools.partial(start_training, arguments, main_rank, model, adapter, owner, arguments_from)
    # A run that only evaluates saves nothing that could be exported.
    save, save_hf = arguments.checkpoint.save, arguments.checkpoint.save_hf
    if save is None or save_hf is None or arguments.validation.skip_train:
        return train()
    return train_and_export(arguments, Path(save), Path(save_hf), main_rank, owner, train)


def of_finished_run(command_line: "CommandLine") -> "CommandLine | None":
    """The command with its own folder to load, if its run is finished already; ``None`` for any other."""
    from mft_megatron.arguments.command import make_arguments
    from mft_megatron.convert.run_start import open_start
    from mft_megatron.data.loading.dataset import packed_lengths, training_packs
    from mft_megatron.training.restarts.finished import continued, is_over

    again = continued(command_line)
    # what cannot be read here is refused in what follows, or is of another run
    with contextlib.suppress(InputError):
        if again is not None:
            world_size = int(os.environ.get("WORLD_SIZE", 1))
            arguments = make_arguments(again, open_start(again)[0], world_size, packed_lengths, training_packs)
            return again if is_over(arguments) else None
    return None


def start_training(
    arguments: "Arguments",
    main_rank: bool,
    model: "HuggingFaceSource | None",
    adapter: "AdapterSource | None",
    owner: "Owner",
    arguments_from: "Callable[[CheckpointRef], Arguments]",
    exports: "Exports | None" = None,
) -> "Ending":
    """Train, unless the run is finished: a job in a chain that has nothing left to do has not failed."""
    from mft_megatron.run_folder.verification import require_whole
    from mft_megatron.training.restarts.endings import Ending

    if arguments.finished:
        if main_rank:
            if arguments.resume is not None:  # not one that was damaged since
                print(require_whole(arguments.resume, arguments.checkpoint.verify_checkpoint), flush=True)
            print(
                f"{arguments.checkpoint.save}: this run is finished, at iteration {arguments.training.train_iters}; "
                f"train on with a larger {'--train-iters' if arguments.total_packs is None else '--num-train-epochs'}",
                flush=True,
            )
        return Ending(arguments.training.train_iters)
    from mft_megatron.training.pretrain import pretrain
    from mft_megatron.training.saving.sources import Sources

    return pretrain(arguments, main_rank, Sources(model, adapter, arguments_from), exports, owner)


def train_and_export(
    arguments: "Arguments",
    run_folder: Path,
    hf_folder: Path,
    main_rank: bool,
    owner: "Owner",
    train: "Callable[..., Ending]",
) -> "Ending":
    """Train with ``--save-hf``: rank 0 exports checkpoints during the run, and the newest at its end.

    A signal leaves exports to the next start.
    """
    from mft_megatron import exit_signals
    from mft_megatron.convert.huggingface.model_export import refuse_export
    from mft_megatron.training.restarts.endings import left_before_the_export
    from mft_megatron.training.saving.removal import remove_exported

    options, resume = arguments.checkpoint, arguments.resume
    refuse_export(arguments.network, resume is not None and resume.info.from_hugging_face)
    if not main_rank:
        return train()
    try:
        with open_exports(arguments, hf_folder) as exports:
            if arguments.finished:  # no rank trains, and what is left to do is done in the run folder
                owner.acquire()
            if options.save_hf_interval is not None and resume is not None and not arguments.weights_alone:
                exports.catch_up(run_folder, options.save_hf_interval, resume.path)
            ending = train(exports)
            if ending.hurried:
                raise exit_signals.LeaveNow
            exit_signals.enter(exit_signals.Phase.AFTER)
            exports.export_newest(run_folder)
    except exit_signals.LeaveNow:  # raised after training alone
        return left_before_the_export(ending)
    remove_exported(options, exports.waiting)
    exports.refuse_failures()
    return ending


def open_exports(arguments: "Arguments", folder: Path) -> "Exports":
    """Prepare the export of checkpoints to ``folder``, as models, or as adapters if adapters are trained."""
    from mft_megatron.convert.background_export import Exports

    direction = "mcore-to-hf" if arguments.adapters is None else "lora-to-peft"
    return Exports(folder, Path(__file__).parent / "tools/convert_checkpoint.py", direction)


if __name__ == "__main__":
    sys.exit(run_command(main, quiet=launcher.local_rank(os.environ) != 0))
