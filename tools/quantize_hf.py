"""Round the weights of a Hugging Face folder to 4 bits, in a separate environment; see --help."""

import sys

from mft_megatron.convert.commands.quantize import main
from mft_megatron.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
