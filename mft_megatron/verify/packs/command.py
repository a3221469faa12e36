"""``packs`` of ``tools/verify.py``: a certificate that samples that share a row do not see each other."""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft_megatron.arguments.command import only_packed_length
from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.arguments.groups.transformer_engine import TransformerEngineArguments
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths
from mft_megatron.data.packing.packing_options import SPLITS
from mft_megatron.data.sample_slices import SampleSlices
from mft_megatron.errors import InputError
from mft_megatron.options import info_of, option, read_options
from mft_megatron.run_folder.description import CheckpointRef
from mft_megatron.run_folder.found import select_checkpoint
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.verification import AUTO, LEVELS, require_whole

from .isolation import Bounds, RowReport, comparable_rows, compare_row
from .report import HEADER, as_json, is_certified, legend, line, verdict

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from mft_megatron.convert.serving.one_process import OpenedModel

EXAMPLE = "example: tools/verify.py packs data/mft --load run --rows 8 --json packs.json"
# Another sample may move by this where two passes over a row differ, or experts get other numbers of tokens: in 16 bits
# 4 units in the last place of 1.
NOISY = {"fp32": 1e-5, "bf16": 4 * 2**-7, "fp16": 4 * 2**-10}
# Alone a sample has other shapes, and kernels sum in another order: in fp32 the largest difference, else the mean.
UNPACKED = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}


def _kernel_option(group: "type[DataclassInstance]", name: str) -> str | None:
    """Declare an option of ``pretrain_mft.py`` that chooses a kernel."""
    (field,) = (field for field in dataclasses.fields(group) if field.name == name)
    return option(
        None, "As in pretrain_mft.py. Not given: the run's own; the default for --hf.", choices=info_of(field).choices
    )


@dataclasses.dataclass(frozen=True)
class PacksOptions:
    """Certify that samples that share a row do not see each other.

    For some rows, replaces one sample and shows that the token losses of no other one move, and that those of each
    sample are what they are without its neighbours. Runs on one process; memory is that of the model in --dtype. Exit
    code 0: certified; 1: not; 2: bad input.
    """

    data_path: str = option(
        None, "Prefix of the data set. The option's name may be left out.", metavar="PREFIX", required=True
    )
    load: str | None = option(
        None, "The model: a run folder (its newest checkpoint), or one iter_NNNNNNN.", metavar="CKPT"
    )
    best: bool = option(False, "With --load: the best checkpoint of the run folder instead of the newest.")
    verify_checkpoint: str = option(
        AUTO, "With --load: as in training, compare the checkpoint's files with their hashes.", choices=LEVELS
    )
    hf: str | None = option(
        None,
        "The model: a Hugging Face folder. With --load: the one that the checkpoint's adapters were trained with, "
        "where it holds them alone.",
        metavar="DIR",
    )
    seq_length: int | None = option(
        None, "Tokens of a row. Not given: the one that the data set is packed for.", at_least=1
    )
    split: str = option("train", "Split of the data set.", choices=SPLITS)
    rows: int = option(4, "Rows to compare, chosen by --seed among those with several samples.", at_least=1)
    seed: int = option(0, "Chooses rows, the sample to replace, and its replacement.", at_least=0)
    dtype: str | None = option(
        None, "Precision of the model. Not given: the run's own; fp32 for --hf.", choices=tuple(NOISY)
    )
    attention_backend: str | None = _kernel_option(TrainingArguments, "attention_backend")
    transformer_impl: str | None = _kernel_option(TransformerEngineArguments, "transformer_impl")
    cross_entropy_impl: str | None = _kernel_option(TrainingArguments, "cross_entropy_impl")
    tolerance: float | None = option(
        None,
        "Fail where losses in the row and unpacked differ by more: fp32, at any token (not given: 1e-4); bf16 and "
        "fp16, in the mean (not given: 0.05 and 0.01). In nats, above a loss of 1 relative to it.",
        above=0,
    )
    json: str | None = option(None, "Also write the result to this file.", metavar="FILE")


def packs(command_line: Sequence[str]) -> int:
    """Compare rows, print a table and the verdict.

    Returns:
        the exit code: 0 certified, 1 failed.

    Raises:
        InputError: the data set or the model cannot be used, or no row has several samples.
    """
    words = list(command_line)
    if words and not words[0].startswith("-"):
        words.insert(0, "--data-path")
    options = read_options(PacksOptions, words, "verify.py packs", epilog=EXAMPLE)
    _refuse_options(options)
    checkpoint = None if options.load is None else select_checkpoint(options.load, options.best)
    if checkpoint is not None:
        print(require_whole(checkpoint, options.verify_checkpoint), flush=True)
    dataset = _open_data(options)
    chosen = list(itertools.islice(comparable_rows(dataset.split(options.split), options.seed), options.rows))
    if not chosen:
        raise InputError(
            f"{options.data_path}, {options.split}, --seq-length {dataset.seq_length}: no row has two samples with "
            "supervised targets, so none could see another; pack the data for a longer --seq-length"
        )
    model, dtype = _open_model(options, checkpoint, dataset)
    facts = {
        "data": options.data_path,
        "dataset_hash": dataset.dataset_hash,
        "split": options.split,
        "seq_length": dataset.seq_length,
        "seed": options.seed,
        "model": options.hf if checkpoint is None else str(checkpoint.path),
        "dtype": dtype,
    }
    reports, bounds = _compare(options, dataset, chosen, model, facts)
    if options.json is not None:
        replace_text(Path(options.json), json.dumps(as_json(facts, reports, bounds), indent=2) + "\n")
    print(verdict(reports, bounds))
    return 0 if is_certified(reports, bounds) else 1


def _refuse_options(options: PacksOptions) -> None:
    if options.load is None and options.hf is None:
        raise InputError("missing option: give the model, --load CKPT or --hf DIR; see --help")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("packs runs on one process; start it without torchrun")
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: its folder does not exist; create it")


def _open_data(options: PacksOptions) -> PackedDataset:
    """Open the data set.

    Raises:
        InputError: it is missing or damaged, or samples of its rows see each other by design, or are alone.
    """
    prefix = options.data_path
    dataset = PackedDataset.open(prefix, options.seq_length or only_packed_length(prefix, packed_lengths(prefix)))
    dataset.split(options.split)
    if dataset.joined:
        raise InputError(
            f"{prefix}: rows are cut from joined samples (--padding-mode concat), which attend to each other by "
            "design; nothing to certify"
        )
    if dataset.padded:
        raise InputError(
            f"{prefix}: a row holds one sample (--padding-mode padding), so none can see another; nothing to certify"
        )
    return dataset


def _open_model(
    options: PacksOptions, checkpoint: CheckpointRef | None, dataset: PackedDataset
) -> "tuple[OpenedModel, str]":
    """Open the model and check that it fits the data set; returns its precision, too."""
    from mft_megatron.training.saving.data_order import refuse_other_data

    from .run_model import KERNELS, open_run_model, options_of_run, refuse_coupled_samples

    run, dtype = {}, options.dtype or "fp32"
    if checkpoint is not None:
        alone = checkpoint.info.lora is not None and not checkpoint.info.has_base
        if options.hf is not None and not alone:
            raise InputError("--load and --hf both give a model; leave one of them out")
        if options.hf is None and alone:
            raise InputError(
                f"--load {checkpoint.path}: holds only adapters; give the model that they were trained with, too: "
                f"--hf DIR (it was {checkpoint.info.base})"
            )
        run, dtype = options_of_run(checkpoint), options.dtype or checkpoint.info.precision
        refuse_coupled_samples(checkpoint, run)
        if run.get("fp8_format") is not None:
            print("note: the run computes in fp8 with scales of whole rows or blocks; here it is 16 bits")
    kernels = {name: getattr(options, name, None) for name in KERNELS}
    data = {"data_path": options.data_path, "seq_length": dataset.seq_length}
    model = open_run_model(options.hf, checkpoint, run, dtype, data, kernels)
    refuse_other_data(model.arguments, dataset)
    return model, dtype


def _compare(
    options: PacksOptions,
    dataset: PackedDataset,
    rows: Sequence[tuple[int, SampleSlices, int]],
    model: "OpenedModel",
    facts: dict[str, Any],
) -> tuple[list[RowReport], Bounds]:
    """Compare the rows, and print a table as they come; device and kernels are added to ``facts``."""
    from mft_megatron.mcore.inference import model_of, token_losses
    from mft_megatron.mcore.model import kernels
    from mft_megatron.mcore.platform import devices

    noisy = NOISY[facts["dtype"]]
    with model_of(model.arguments, model.vocab_size, model.source, model.adapters) as built:
        exact, on_cpu = model.arguments.network.num_experts is None, devices.device().type == "cpu"
        bounds = Bounds(
            others=0.0 if exact else noisy,
            noisy=0.0 if exact and on_cpu else noisy,
            unpacked=UNPACKED[facts["dtype"]] if options.tolerance is None else options.tolerance,
            mean=facts["dtype"] != "fp32",
        )
        facts |= {"device": devices.describe(), "kernels": kernels.describe(model.arguments, built.config)}
        print(f"{facts['data']}, {facts['split']}, length {facts['seq_length']}; {facts['model']}, {facts['dtype']}")
        print(f"{facts['device']}; {facts['kernels']}\n{legend(bounds)}\n{HEADER}", flush=True)
        reports = []
        for pack, row, index in rows:
            losses = partial(token_losses, built)
            reports.append(compare_row(losses, dataset, pack, row, index, options.seed, bounds.mean))
            print(line(reports[-1]), flush=True)
    if len(rows) < options.rows:
        print(f"note: {options.split} has no more than {len(rows)} such rows; --rows {options.rows}")
    return reports, bounds
