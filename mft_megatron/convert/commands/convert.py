"""The command line of ``tools/convert_checkpoint.py``."""

from collections.abc import Callable, Mapping, Sequence

from mft_megatron.errors import InputError

from .check import check
from .huggingface import hf_to_mcore, mcore_to_hf
from .megatron import megatron_to_mcore
from .merge import merge_lora
from .peft import list_adapters, lora_to_peft

# functions from the words after the direction
DIRECTIONS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "hf-to-mcore": hf_to_mcore,
    "mcore-to-hf": mcore_to_hf,
    "check": check,
    "megatron-to-mcore": megatron_to_mcore,
    "lora-to-peft": lora_to_peft,
    "merge-lora": merge_lora,
    "adapters": list_adapters,
}


def main(command_line: Sequence[str]) -> None:
    """Run the direction that the first word names.

    Raises:
        InputError: there is no such direction, or it failed.
    """
    word = command_line[0] if command_line else "--help"
    if word in ("-h", "--help"):
        print(
            f"usage: convert_checkpoint.py {{{','.join(DIRECTIONS)}}} [options]\n\nEach direction has its own --help."
        )
        return
    if word not in DIRECTIONS:
        raise InputError(f"unknown direction {word!r}; give one of: {', '.join(DIRECTIONS)}")
    DIRECTIONS[word](command_line[1:])
