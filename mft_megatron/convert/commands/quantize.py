"""The command line of ``tools/quantize_hf.py``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.convert.huggingface.model_folder import CONFIG, read_config
from mft_megatron.convert.serving.quantize import METHODS, calibration, quantize
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths
from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options

from .options import exported_folder_option, new_folder_option


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Quantise a Hugging Face folder to 4 bits a weight (compressed-tensors), for vLLM and transformers.

    Runs in a separate environment: examples/int4/requirements.txt.
    """

    hf: str = exported_folder_option()
    out: str = new_folder_option()
    method: str = option("gptq", "Method of rounding.", choices=METHODS)
    data_path: str = option(
        None,
        "Data set whose text shows which weights matter: its --output-prefix.",
        metavar="PREFIX",
        required=True,
    )
    seq_length: int | None = option(None, "Sequence length of its packs, where it has several.", at_least=1)
    split: str = option("valid", "Split to take text from.", choices=("train", "valid", "test"))
    samples: int = option(512, "Samples to take in total, evenly from all tasks.", at_least=1)


def main(command_line: Sequence[str]) -> None:
    """Quantise a Hugging Face folder.

    Raises:
        InputError: model and data set do not fit, the method cannot run here, or the target exists.
    """
    options = read_options(QuantizeOptions, command_line, "quantize_hf.py")
    vocab_size = read_config(Path(options.hf)).get("vocab_size")
    lengths = packed_lengths(options.data_path)
    if options.seq_length is None and len(lengths) != 1:
        raise InputError(
            f"missing option: give --seq-length; {options.data_path} is packed for {', '.join(map(str, lengths))}"
        )
    dataset = PackedDataset.open(options.data_path, options.seq_length or lengths[0])
    if not isinstance(vocab_size, int) or dataset.vocab_size > vocab_size:
        raise InputError(
            f"{Path(options.hf) / CONFIG}: vocabulary of {vocab_size}, the data set {options.data_path} needs "
            f"{dataset.vocab_size}; it was written with another model's tokenizer"
        )
    chosen = calibration(dataset, options.split, options.samples)
    counts = ", ".join(f"{name} {count:,}" for name, count in chosen.by_task.items())
    print(f"calibration: {len(chosen.texts):,} samples, {sum(map(len, chosen.texts)):,} tokens ({counts})", flush=True)
    quantize(Path(options.hf), Path(options.out), options.method, chosen.texts)
    print(f"{options.hf} -> {options.out}: {options.method}, 4 bits")
