"""``check`` of ``tools/convert_checkpoint.py``: can a server load a folder, and does it compute the trained model?"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mft_megatron.data.chat_templates.trained_format import TrainedFormat, trained_format
from mft_megatron.data.storage.ledger import Ledger, read_ledger
from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options
from mft_megatron.parsing.git_lfs import refuse_pointer
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.run_folder.found import select_checkpoint
from mft_megatron.run_folder.names import TOKENIZER
from mft_megatron.run_folder.verification import require_whole

from .options import best_of_load_option, exported_folder_option, verify_option

if TYPE_CHECKING:
    from mft_megatron.convert.serving.finding import Finding
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
        "Compare the folder with this checkpoint (run folder, or one iter_NNNNNNN) instead of with itself, and "
        "tokenizer, chat template and stop tokens with those that were trained.",
        metavar="CKPT",
    )
    best: bool = best_of_load_option()
    verify_checkpoint: str = verify_option()
    data_path: str | None = option(
        None,
        "Data set of the training: prompts of its first samples, as a server sends them, must be the stored ids.",
        metavar="PREFIX",
    )
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
    ledger = None if options.data_path is None else read_ledger(options.data_path)
    tokenizer, reason = _tokenizer(folder)
    wrong = []
    for finding in itertools.chain(
        folder_check.findings(folder, tokenizer, reason), _of_training(options, tokenizer, checkpoint, ledger)
    ):
        print(f"{finding.verdict:<8} {finding.subject:<22} {finding.text}", flush=True)
        wrong += [finding.subject] if finding.verdict == "wrong" else []
    if wrong:
        raise InputError(f"--hf {folder}: {', '.join(dict.fromkeys(wrong))} wrong; see above, nothing was computed")
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
        raise InputError(
            f"--load {options.load}: has adapters; merge them with merge-lora and check that folder, with --data-path"
        )
    print(require_whole(selected, options.verify_checkpoint), flush=True)
    return selected


def _tokenizer(folder: Path) -> "tuple[ServedTokenizer | None, str]":
    """Load the folder's tokenizer as a server would; ``None`` and the reason if that fails.

    Raises:
        InputError: a file is a pointer of Git LFS.
    """
    from mft_megatron.convert.serving.prompts import CHAT, VOCABULARIES, has_vocabulary

    if not has_vocabulary(folder):  # transformers makes an empty tokenizer for some models, and does not fail
        return None, f"no file of a vocabulary ({', '.join(VOCABULARIES[:3])} …)"
    for name in VOCABULARIES:
        for file in folder.glob(name):
            refuse_pointer(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # of an empty vocabulary a text is nothing, or one unknown token
            if len(set(tokenizer(CHAT[0]["content"], add_special_tokens=False)["input_ids"])) < 2:
                return None, "transformers loads one without a vocabulary; its files are incomplete"
            return tokenizer, ""
    except Exception as error:  # damaged files fail in many ways
        return None, f"transformers loads none ({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})"


def _of_training(
    options: CheckOptions, tokenizer: "ServedTokenizer | None", checkpoint: CheckpointRef | None, ledger: Ledger | None
) -> "Iterator[Finding]":
    """Compare tokenizer, template, stop tokens and prompts with those of the training."""
    from mft_megatron.convert.huggingface.chat_files import trained_format_of
    from mft_megatron.convert.serving.finding import Finding
    from mft_megatron.convert.serving.trained_chat import prompt_findings, stop_finding, template_finding
    from mft_megatron.convert.serving.trained_tokenizer import tokenizer_finding

    origins: list[tuple[str, TrainedFormat | None, Sequence[int], Mapping[str, Any], Path]] = []
    recorded: Mapping[str, Any]
    if checkpoint is not None and checkpoint.info.tokenizer:
        recorded, kept = checkpoint.info.tokenizer, checkpoint.path.parent / TOKENIZER
        stops = recorded.get("stop_token_ids") or []
        origins.append((str(checkpoint.path), trained_format_of(checkpoint.info), stops, recorded, kept))
    if ledger is not None:
        recorded, kept = dataclasses.asdict(ledger.tokenizer), Path(ledger.tokenizer.model)
        stops = ledger.chat_template["stop_token_ids"]
        origins.append((str(options.data_path), trained_format(ledger), stops, recorded, kept))
    for where, trained, stops, recorded, kept in origins:
        if tokenizer is None:
            verdict: Literal["note", "wrong"] = "note" if ledger is None else "wrong"
            yield Finding(verdict, "trained chat format", f"not compared with {where}, as there is no tokenizer")
            continue
        if "fingerprint" in recorded:
            originals = [kept, Path(recorded["model"])]
            yield tokenizer_finding(Path(options.hf), recorded["type"], recorded["fingerprint"], originals, where)
        yield template_finding(tokenizer, trained, where)
        if trained is not None:  # before it was recorded, tokens that no answer ended with were listed as well
            yield stop_finding(Path(options.hf), stops, where)
    if ledger is not None and tokenizer is not None:
        yield from prompt_findings(tokenizer, str(options.data_path), ledger)


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
