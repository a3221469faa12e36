"""``check`` of ``tools/convert_checkpoint.py``: can a server load a folder, and does it compute the trained model?"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.run_folder import CheckpointRef, select_checkpoint

from .options import best_of_load_option, exported_folder_option

if TYPE_CHECKING:
    from mft_megatron.convert.serving.logits_check import Difference
    from mft_megatron.convert.serving.prompts import ServedTokenizer

# fp32: largest difference of a logit. 16 bits: mean KL divergence, as a logit of 20 has a precision of only 0.1.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 5e-3}


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """Check a Hugging Face folder as a server sees it, and compare its logits by transformers and by Megatron-Core.

    Runs on one process. Memory is that of the model in --dtype, once: one program computes after the other.
    """

    hf: str = exported_folder_option()
    load: str | None = option(
        None,
        "Compare the folder with this checkpoint (run folder, or one iter_NNNNNNN) instead of with itself.",
        metavar="CKPT",
    )
    best: bool = best_of_load_option()
    dtype: str = option("fp32", "Precision of both.", choices=tuple(TOLERANCES))
    prompts: str | None = option(
        None,
        "One prompt a line, plain or as a JSON string. Not given: built-in ones; random tokens without a tokenizer.",
        metavar="FILE",
    )
    max_tokens: int = option(256, "Cut prompts to this many tokens.", at_least=1)
    tolerance: float | None = option(
        None,
        "Fail above this: fp32, the largest difference of any logit (not given: 1e-4); bf16 and fp16, the mean KL "
        "divergence in nats (not given: 5e-3).",
        above=0,
    )


def check(command_line: Sequence[str]) -> None:
    """Check a folder for a server, and print the findings.

    Raises:
        InputError: a server cannot load the folder, or the logits differ too much.
    """
    options = read_options(CheckOptions, command_line, "convert_checkpoint.py check")
    folder = Path(options.hf)
    checkpoint = _checkpoint(options)
    from mft_megatron.convert.huggingface.model_folder import read_architecture
    from mft_megatron.convert.serving import folder_check, logits_check
    from mft_megatron.convert.serving.prompts import encode, read_prompts

    prompts = read_prompts(Path(options.prompts)) if options.prompts else None
    tokenizer, reason = _tokenizer(folder)
    wrong = []
    for finding in folder_check.findings(folder, tokenizer, reason):
        print(f"{finding.verdict:<8} {finding.subject:<22} {finding.text}", flush=True)
        wrong += [finding.subject] if finding.verdict == "wrong" else []
    if wrong:
        raise InputError(f"--hf {folder}: {', '.join(wrong)} wrong; see above, nothing was computed")
    vocab_size = read_architecture(folder)[2]
    if checkpoint is not None and checkpoint.info.vocab_size != vocab_size:
        raise InputError(
            f"--hf {folder}: vocabulary of {vocab_size}, {checkpoint.path} has {checkpoint.info.vocab_size}; they are "
            "different models"
        )
    texts = encode(tokenizer, prompts, vocab_size, options.max_tokens)
    theirs = logits_check.transformers_logits(folder, options.dtype, texts.values())
    ours = logits_check.engine_logits(folder, checkpoint, options.dtype, list(texts.values()))
    differences = list(map(logits_check.compare, theirs, ours))
    _report(dict(zip(texts, differences, strict=True)), logits_check.combine(differences), options, checkpoint)


def _checkpoint(options: CheckOptions) -> CheckpointRef | None:
    if options.load is None:
        return None
    selected = select_checkpoint(options.load, options.best)
    if selected.info.lora is not None:
        raise InputError(f"--load {options.load}: has adapters; merge them with merge-lora and check that folder alone")
    return selected


def _tokenizer(folder: Path) -> "tuple[ServedTokenizer | None, str]":
    """Load the folder's tokenizer as a server would; ``None`` and the reason if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder), ""
    except Exception as error:  # damaged files fail in many ways
        return None, f"transformers loads none ({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})"


def _report(
    differences: "Mapping[str, Difference]",
    total: "Difference",
    options: CheckOptions,
    checkpoint: CheckpointRef | None,
) -> None:
    """Print the differences of each prompt.

    Raises:
        InputError: ``total`` is above the tolerance.
    """
    engine = "Megatron-Core" if checkpoint is None else f"Megatron-Core with {checkpoint.path}"
    print(f"\nlogits of transformers and {engine}, {options.dtype}")
    print(f"{'prompt':<12} {'tokens':>7} {'max |dlogit|':>13} {'KL (nats)':>11} {'top-1':>7}")
    for name, one in {**differences, "total": total}.items():
        print(f"{name:<12} {one.tokens:>7,} {one.largest:>13.2e} {one.divergence:>11.2e} {one.agreement:>7.1%}")
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    if options.dtype == "fp32":
        value, what = total.largest, "largest difference of a logit"
    else:
        value, what = total.divergence, "mean KL"
    if not value <= tolerance:  # NaN, too
        raise InputError(
            f"--hf {options.hf}: the {what} is {value:.2e}, above --tolerance {tolerance:g}; do not serve this folder, "
            "or give a larger tolerance where you know why they differ"
        )
