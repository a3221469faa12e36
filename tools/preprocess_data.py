"""Tokenise and pack the files of several tasks into a memory-mapped data set; see --help."""

import sys

from mft_megatron.data.command import preprocess_main
from mft_megatron.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: preprocess_main(sys.argv[1:])))
