"""``tools/convert_checkpoint.py check``: is this folder what a server can load, and does it compute what we trained."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.run_folder import CheckpointRef, select_checkpoint

# of fp32 the largest difference of a logit; of 16 bits the mean KL divergence, since a logit of 20 is only known to 0.1
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 5e-3}


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """A Hugging Face folder as a server sees it, and its logits by transformers against those of Megatron-Core.

    Runs on one process. Memory is that of the model in --dtype, once: one program computes after the other.
    """

    hf: str = option(None, "Folder of the model, as mcore-to-hf wrote it.", metavar="DIR", required=True)
    load: str | None = option(
        None,
        "Compare the folder with this checkpoint (run folder, or one iter_NNNNNNN) instead of with itself.",
        metavar="CKPT",
    )
    best: bool = option(False, "With --load: the best checkpoint of the run folder instead of the newest.")
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
    """Check a folder for a server.

    Raises:
        InputError: something is wrong with the folder, or the logits differ too much.
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
    found = select_checkpoint(options.load, options.best)
    if found.info.lora is not None:
        raise InputError(f"--load {options.load}: has adapters; merge them with merge-lora and check that folder alone")
    return found


def _tokenizer(folder: Path) -> tuple[Any, str]:
    """The folder's tokenizer as a server would load it, or ``None`` and why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder), ""
    except Exception as error:  # whatever stands in its files
        return None, f"transformers loads none ({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})"


def _report(differences: dict[str, Any], total: Any, options: CheckOptions, checkpoint: Any) -> None:
    with_what = "Megatron-Core" if checkpoint is None else f"Megatron-Core with {checkpoint.path}"
    print(f"\nlogits of transformers and {with_what}, {options.dtype}")
    print(f"{'prompt':<12} {'tokens':>7} {'max |dlogit|':>13} {'KL (nats)':>11} {'top-1':>7}")
    for name, one in {**differences, "total": total}.items():
        print(f"{name:<12} {one.tokens:>7,} {one.largest:>13.2e} {one.divergence:>11.2e} {one.agreement:>7.1%}")
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    in_full = options.dtype == "fp32"
    value, what = (total.largest, "largest difference of a logit") if in_full else (total.divergence, "mean KL")
    if not value <= tolerance:  # NaN, too
        raise InputError(
            f"--hf {options.hf}: the {what} is {value:.2e}, above --tolerance {tolerance:g}; do not serve this folder, "
            "or give a larger tolerance where you know why they differ"
        )
