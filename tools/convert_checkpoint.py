"""Convert between Megatron-Core distributed checkpoints and Hugging Face folders; see --help."""

import sys

from mft_megatron.convert.command import main
from mft_megatron.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
