"""Show what is in a checkpoint or a run folder, and whether it is whole; see --help."""

import sys

from mft_megatron.errors import run_command
from mft_megatron.run_folder.inspection.command import inspect_checkpoint

if __name__ == "__main__":
    sys.exit(run_command(lambda: inspect_checkpoint(sys.argv[1:])))
