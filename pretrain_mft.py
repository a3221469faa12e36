"""Multi-task fine-tuning on Megatron-Core.

    torchrun --nproc-per-node 4 pretrain_mft.py --data-path PREFIX --save DIR <Megatron arguments> --mft-loss task-token

See ``--help`` for all options, and README.md for a whole run.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mft_megatron import launcher, parent_process
from mft_megatron.errors import InputError, run_command

if TYPE_CHECKING:
    from mft_megatron.arguments.table import Arguments
    from mft_megatron.convert.background_export import Exports
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.convert.peft.weight_source import AdapterSource
    from mft_megatron.run_folder.owner.owner import Owner


def main() -> int | None:
    """Check every option first; only then load torch and start process groups."""
    parent_process.end_with_launcher(os.environ)
    from mft_megatron.arguments.checks.lora import check_trained_model
    from mft_megatron.arguments.command import make_arguments, read_command_line
    from mft_megatron.arguments.groups.dry_run import DRY_RUN, DryRunArguments, refuse_without_dry_run
    from mft_megatron.convert.run_start import open_start
    from mft_megatron.data.loading.dataset import packed_lengths, training_packs
    from mft_megatron.run_folder.owner.owner import Owner

    command_line = read_command_line(sys.argv[1:], more=DRY_RUN)
    if command_line.group(DryRunArguments).dry_run:
        from mft_megatron.dry_run.command import dry_run

        return dry_run(command_line)
    refuse_without_dry_run(command_line.asked_for)
    launcher.complete(os.environ)
    start, model, adapter = open_start(command_line)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = make_arguments(command_line, start, world_size, packed_lengths, training_packs)
    if problem := check_trained_model(arguments):
        raise InputError(problem)
    main_rank = os.environ.get("RANK", "0") == "0"
    # A run that only evaluates saves nothing that could be exported.
    save, save_hf = arguments.checkpoint.save, arguments.checkpoint.save_hf
    with Owner(save or ".") as owner:
        run = functools.partial(start_training, arguments, main_rank, model, adapter, owner)
        if save is None or save_hf is None or arguments.validation.skip_train:
            run()
        else:
            run_and_export(arguments, Path(save), Path(save_hf), main_rank, run)
    return None


def start_training(
    arguments: "Arguments",
    main_rank: bool,
    model: "HuggingFaceSource | None",
    adapter: "AdapterSource | None",
    owner: "Owner",
    exports: "Exports | None" = None,
) -> None:
    """Train, unless the run is finished: a job in a chain that has nothing left to do has not failed."""
    if arguments.finished:
        if main_rank:
            print(
                f"{arguments.checkpoint.save}: this run is finished, at iteration {arguments.training.train_iters}; "
                f"train on with a larger {'--train-iters' if arguments.total_packs is None else '--num-train-epochs'}",
                flush=True,
            )
        return
    from mft_megatron.training.pretrain import pretrain
    from mft_megatron.training.saving.sources import Sources

    parent_process.end_forked_with_this()
    pretrain(arguments, main_rank, Sources(model, adapter), exports, owner)


def run_and_export(
    arguments: "Arguments", run_folder: Path, hf_folder: Path, main_rank: bool, run: Callable[..., None]
) -> None:
    """Train with ``--save-hf``: rank 0 exports checkpoints during the run, and the newest at its end."""
    from mft_megatron.convert.huggingface.model_export import refuse_export
    from mft_megatron.training.saving.saver import remove_exported

    options, resume = arguments.checkpoint, arguments.resume
    refuse_export(arguments.network, resume is not None and resume.info.from_hugging_face)
    if not main_rank:
        run()
        return
    with open_exports(arguments, hf_folder) as exports:
        if options.save_hf_interval is not None and resume is not None and not arguments.weights_alone:
            exports.catch_up(run_folder, options.save_hf_interval, resume.path)
        run(exports)
        exports.export_newest(run_folder)
    remove_exported(options, exports.waiting)
    exports.refuse_failures()


def open_exports(arguments: "Arguments", folder: Path) -> "Exports":
    """Prepare the export of checkpoints to ``folder``, as models, or as adapters if adapters are trained."""
    from mft_megatron.convert.background_export import Exports

    direction = "mcore-to-hf" if arguments.adapters is None else "lora-to-peft"
    return Exports(folder, Path(__file__).parent / "tools/convert_checkpoint.py", direction)


# The guard matters: the checkpoint writer starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(run_command(main, quiet=launcher.local_rank(os.environ) != 0))
