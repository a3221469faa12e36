"""Multi-task fine-tuning on Megatron-Core.

    torchrun --nproc-per-node 4 pretrain_mft.py --data-path PREFIX --save DIR <Megatron arguments> --mft-loss task-token

See ``--help`` for all options, and README.md for a whole run.
"""

import os
import sys
from pathlib import Path

from mft_megatron.errors import run_command
from mft_megatron.run_folder import CheckpointInfo


def main() -> None:
    """Check every option first; only then load torch and start process groups."""
    from mft_megatron.arguments import parse_arguments
    from mft_megatron.data.dataset import packed_lengths

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = parse_arguments(
        sys.argv[1:],
        world_size,
        packed_lengths,
        lambda folder: open_source(folder).info,
        lambda folder, info: open_adapter(folder, info).lora,
    )
    from mft_megatron.training.pretrain import pretrain
    from mft_megatron.training.saving import remove_exported
    from mft_megatron.training.sources import Sources

    model = open_source(arguments.checkpoint.hf_checkpoint) if arguments.reads_hf else None
    adapter = open_adapter(arguments.lora.hf_adapter, arguments.resume[1]) if arguments.starts_from_adapter else None
    main_rank, hf = os.environ.get("RANK", "0") == "0", arguments.checkpoint.save_hf
    if hf is not None:
        from mft_megatron.convert.hf_export import refuse_export

        refuse_export(arguments.network, arguments.resume is not None and arguments.resume[1].from_hugging_face)
    if hf is None or not main_rank:
        pretrain(arguments, main_rank, Sources(model, adapter))
        return
    with open_exports(arguments) as exports:
        pretrain(arguments, main_rank, Sources(model, adapter), exports)
        exports.export_newest(Path(arguments.checkpoint.save))
    remove_exported(arguments.checkpoint, exports.waiting)
    exports.refuse_failures()


def open_source(folder: str):
    """The model of ``--hf-checkpoint``; imported only where it is asked for."""
    from mft_megatron.convert.hf_source import HuggingFaceSource

    return HuggingFaceSource(folder)


def open_adapter(folder: str, info: CheckpointInfo):
    """The adapter of ``--hf-adapter``, for the model that ``info`` describes."""
    from mft_megatron.convert.peft_source import AdapterSource

    return AdapterSource(folder, info)


def open_exports(arguments):
    """What writes checkpoints to ``--save-hf``: models, or adapters where those are what is trained."""
    from mft_megatron.convert.exports import Exports

    direction = "mcore-to-hf" if arguments.adapters is None else "lora-to-peft"
    return Exports(Path(arguments.checkpoint.save_hf), Path(__file__).parent / "tools/convert_checkpoint.py", direction)


# The guard matters: the checkpoint writer starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(run_command(main, quiet=os.environ.get("LOCAL_RANK", "0") != "0"))
