"""Certify on your own data and model that packs and the objective are what they are said to be; see --help."""

import os
import sys

from mft_megatron import launcher
from mft_megatron.errors import run_command
from mft_megatron.verify.command import main


def certify() -> int:
    """Run the certificate of the command line as one of its ranks."""
    launcher.complete(os.environ)
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(certify, quiet=launcher.local_rank(os.environ) != 0))
