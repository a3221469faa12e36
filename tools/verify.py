"""Certify on your own data and model that packs and the objective are what they are said to be; see --help."""

import os
import sys

from mft_megatron.errors import run_command
from mft_megatron.verify.command import main

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), quiet=os.environ.get("LOCAL_RANK", "0") != "0"))
