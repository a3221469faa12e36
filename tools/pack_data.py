"""Pack stored samples again without tokenising: another length, other options, or several data sets merged."""

import sys

from mft_megatron.data.command import pack_main
from mft_megatron.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: pack_main(sys.argv[1:])))
