"""Convert between Megatron-Core distributed checkpoints and Hugging Face folders; see --help."""

import signal
import sys

from mft_megatron import parent_process
from mft_megatron.convert.commands.convert import main
from mft_megatron.errors import run_command

if __name__ == "__main__":
    # torchrun terminates a run's exports with SIGTERM; as an interrupt it removes the unfinished folder
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent_process.end_as_told()
    sys.exit(run_command(lambda: main(sys.argv[1:])))
