"""Multi-task fine-tuning on Megatron-Core.

    torchrun --nproc-per-node 4 pretrain_mft.py --data-path PREFIX --save DIR <Megatron arguments> --mft-loss task-token

See ``--help`` for all options, and README.md for a whole run.
"""

import functools
import os
import sys
from pathlib import Path

from mft_megatron.errors import run_command
from mft_megatron.run_folder import CheckpointInfo


def main() -> None:
    """Check every option first; only then load torch and start process groups."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.data.loading.dataset import packed_lengths

    # options depend on the adapter, and opening it reads its matrices: once
    adapters = {}

    def describe_adapter(folder: str, info: CheckpointInfo):
        adapters[folder] = open_adapter(folder, info)
        return adapters[folder].lora

    arguments = parse_arguments(
        sys.argv[1:],
        int(os.environ.get("WORLD_SIZE", 1)),
        packed_lengths,
        lambda folder: open_source(folder).info,
        describe_adapter,
    )
    from mft_megatron.training.pretrain import pretrain
    from mft_megatron.training.saving import Sources

    model = open_source(arguments.checkpoint.hf_checkpoint) if arguments.reads_hf else None
    adapter = adapters.get(arguments.lora.hf_adapter)
    main_rank = os.environ.get("RANK", "0") == "0"
    run = functools.partial(pretrain, arguments, main_rank, Sources(model, adapter))
    # an evaluation alone saves nothing that could be exported
    if arguments.checkpoint.save_hf is None or arguments.validation.skip_train:
        run()
    else:
        run_and_export(arguments, main_rank, run)


def run_and_export(arguments, main_rank: bool, run) -> None:
    """``--save-hf``: rank 0 has checkpoints exported while the run goes on, and the newest at its end."""
    from mft_megatron.convert.huggingface.model_export import refuse_export
    from mft_megatron.training.saving import remove_exported

    options, resume = arguments.checkpoint, arguments.resume
    refuse_export(arguments.network, resume is not None and resume.info.from_hugging_face)
    if not main_rank:
        run()
        return
    with open_exports(arguments) as exports:
        if options.save_hf_interval is not None and resume is not None and not arguments.weights_alone:
            exports.catch_up(Path(options.save), options.save_hf_interval, resume.path)
        run(exports)
        exports.export_newest(Path(options.save))
    remove_exported(options, exports.waiting)
    exports.refuse_failures()


@functools.cache
def open_source(folder: str):
    """The model of ``--hf-checkpoint``; imported only where it is asked for."""
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource

    return HuggingFaceSource(folder)


def open_adapter(folder: str, info: CheckpointInfo):
    """The adapter of ``--hf-adapter``, for the model that ``info`` describes."""
    from mft_megatron.convert.peft.weight_source import AdapterSource

    return AdapterSource(folder, info)


def open_exports(arguments):
    """What writes checkpoints to ``--save-hf``: models, or adapters where those are what is trained."""
    from mft_megatron.convert.background_export import Exports

    direction = "mcore-to-hf" if arguments.adapters is None else "lora-to-peft"
    return Exports(Path(arguments.checkpoint.save_hf), Path(__file__).parent / "tools/convert_checkpoint.py", direction)


# The guard matters: the checkpoint writer starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(run_command(main, quiet=os.environ.get("LOCAL_RANK", "0") != "0"))
