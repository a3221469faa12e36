"""Show and check a packed data set; see --help."""

import sys

from mft_megatron.data.command import inspect_main
from mft_megatron.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: inspect_main(sys.argv[1:])))
