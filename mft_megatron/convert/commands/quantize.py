"""The command line of ``tools/quantize_hf.py``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.convert.huggingface.model_folder import CONFIG, read_config
from mft_megatron.convert.serving.quantize import METHODS, calibration, quantize
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths
from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """A Hugging Face folder becomes one with 4 bits a weight (compressed-tensors), for vLLM and transformers.

    Runs in an environment of its own: examples/int4/requirements.txt.
    """

    hf: str = option(None, "Folder of the model, as mcore-to-hf wrote it.", metavar="DIR", required=True)
    out: str = option(None, "Folder to write; must not exist.", metavar="DIR", required=True)
    method: str = option("gptq", "How to round.", choices=METHODS)
    data_path: str = option(
        None, "Data set whose text shows what matters: its --output-prefix.", metavar="PREFIX", required=True
    )
    seq_length: int | None = option(None, "Sequence length it is packed for, where there are several.", at_least=1)
    split: str = option("valid", "Split to take text from.", choices=("train", "valid", "test"))
    samples: int = option(512, "Samples to take, from all tasks alike.", at_least=1)


def main(command_line: Sequence[str]) -> None:
    """Quantise a folder."""
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
    found = calibration(dataset, options.split, options.samples)
    shares = ", ".join(f"{name} {number:,}" for name, number in found.by_task.items())
    print(f"calibration: {len(found.texts):,} samples, {sum(map(len, found.texts)):,} tokens ({shares})", flush=True)
    quantize(Path(options.hf), Path(options.out), options.method, found.texts)
    print(f"{options.hf} -> {options.out}: {options.method}, 4 bits")
