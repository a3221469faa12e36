"""Multi-task fine-tuning on Megatron-Core.

    torchrun --nproc-per-node 4 pretrain_mft.py --data-path PREFIX --save DIR <Megatron arguments> --mft-loss task-token

See ``--help`` for all options, and README.md for a whole run.
"""

import os
import sys
from pathlib import Path

from mft_megatron.errors import run_command


def main() -> None:
    """Check every option first; only then load torch and start process groups."""
    from mft_megatron.arguments import parse_arguments
    from mft_megatron.data.dataset import packed_lengths

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = parse_arguments(sys.argv[1:], world_size, packed_lengths, lambda folder: open_source(folder).info)
    from mft_megatron.training.pretrain import pretrain

    source = open_source(arguments.checkpoint.hf_checkpoint) if arguments.starts_from_hf else None
    main_rank, hf = os.environ.get("RANK", "0") == "0", arguments.checkpoint.save_hf
    if hf is not None:
        from mft_megatron.convert.hf_export import export_newest, refuse_export

        refuse_export(arguments.network, arguments.resume is not None and arguments.resume[1].source != "")
    pretrain(arguments, main_rank, source)
    if hf is not None and main_rank:
        written = export_newest(Path(arguments.checkpoint.save), Path(hf))
        print(f"--save-hf: {written or 'is there already'}", flush=True)


def open_source(folder: str):
    """The model of ``--hf-checkpoint``; imported only where it is asked for."""
    from mft_megatron.convert.hf_source import HuggingFaceSource

    return HuggingFaceSource(folder)


# The guard matters: the checkpoint writer starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(run_command(main, quiet=os.environ.get("LOCAL_RANK", "0") != "0"))
