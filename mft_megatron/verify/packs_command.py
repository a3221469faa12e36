"""``packs`` of ``tools/verify.py``: a certificate that samples that share a row do not see each other."""

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft_megatron.arguments.command import only_packed_length
from mft_megatron.arguments.config_file import read_config_file
from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.arguments.groups.transformer_engine import TransformerEngineArguments
from mft_megatron.arguments.megatron_only import MEGATRON_ONLY
from mft_megatron.arguments.table import GROUPS
from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths
from mft_megatron.data.packing.packing_options import SPLITS
from mft_megatron.errors import InputError
from mft_megatron.options import Given, info_of, option, read_options
from mft_megatron.run_folder import CONFIG, CheckpointRef, replace_text, select_checkpoint

from .pack_isolation import Bounds, RowReport, comparable_rows, compare_row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from mft_megatron.convert.serving.one_process import OpenedModel

EXAMPLE = "example: tools/verify.py packs data/mft --load run --rows 8 --json packs.json"
# options of a run that choose how its forward pass is computed
KERNELS = ("attention_backend", "transformer_impl", "cross_entropy_impl", "moe_router_dtype")
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
    hf: str | None = option(None, "The model: a Hugging Face folder.", metavar="DIR")
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
    if (options.load is None) == (options.hf is None):
        raise InputError("give the model: --load CKPT or --hf DIR, one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("packs runs on one process; start it without torchrun")
    checkpoint = None if options.load is None else select_checkpoint(options.load, options.best)
    run = {} if checkpoint is None else _options_of_run(checkpoint)
    dtype = options.dtype or ("fp32" if checkpoint is None else checkpoint.info.precision)
    dataset, model = _open(options, checkpoint, run, dtype)
    chosen = list(itertools.islice(comparable_rows(dataset.split(options.split), options.seed), options.rows))
    if not chosen:
        raise InputError(
            f"{options.data_path}, {options.split}, --seq-length {dataset.seq_length}: no row has two samples with "
            "supervised targets, so none could see another; pack the data for a longer --seq-length"
        )
    from mft_megatron.mcore.inference import model_of, token_losses
    from mft_megatron.mcore.model import kernels
    from mft_megatron.mcore.platform import devices

    on_cpu = devices.device().type == "cpu"
    noisy = NOISY[dtype]
    exact = model.arguments.network.num_experts is None
    bounds = Bounds(
        others=0.0 if exact else noisy,
        noisy=0.0 if exact and on_cpu else noisy,
        unpacked=UNPACKED[dtype] if options.tolerance is None else options.tolerance,
        mean=dtype != "fp32",
    )
    facts: dict[str, Any] = {
        "certificate": "packs",
        "data": options.data_path,
        "dataset_hash": dataset.dataset_hash,
        "split": options.split,
        "seq_length": dataset.seq_length,
        "model": options.hf if checkpoint is None else str(checkpoint.path),
        "dtype": dtype,
        "seed": options.seed,
        "device": devices.describe(),
    }
    reports = []
    with model_of(model.arguments, model.vocab_size, model.source) as built:
        facts["kernels"] = kernels.describe(model.arguments, built.config)
        print(
            f"rows of {options.data_path}, {options.split}, length {dataset.seq_length}; model {facts['model']}, "
            f"{dtype}\n{facts['device']}; {facts['kernels']}"
        )
        if run.get("fp8_format"):
            print("note: the run computes in fp8, whose scales are of whole rows; here it is bf16")
        print(
            "change of token losses in nats, relative above 1: of others when one sample is replaced, largest (bound "
            f"{_words(bounds)}); of itself, largest; of the row against unpacked, "
            f"{'mean' if bounds.mean else 'largest'} (bound {bounds.unpacked:g})"
        )
        print(f"{'row':>8} {'samples':>7}  {'replaced':<24} {'others':>9} {'itself':>9} {'unpacked':>9}  tasks")
        for pack, row, index in chosen:
            report = compare_row(
                lambda batch: token_losses(built, batch), dataset, pack, row, index, options.seed, bounds.mean
            )
            reports.append(report)
            print(_line(report), flush=True)
    failures = [failure for report in reports for failure in report.failures(bounds)]
    samples = sum(len(report.samples) for report in reports)
    if options.json is not None:
        rows = [dataclasses.asdict(report) | {"failures": report.failures(bounds)} for report in reports]
        result = {**facts, "certified": not failures, "bounds": dataclasses.asdict(bounds), "rows": rows}
        replace_text(Path(options.json), json.dumps(result, indent=2) + "\n")
    if failures:
        print("FAILED: " + "; ".join(failures))
        return 1
    print(f"certified: in {len(reports)} row(s) with {samples} samples none sees another")
    return 0


def _open(
    options: PacksOptions, checkpoint: CheckpointRef | None, run: Given, dtype: str
) -> "tuple[PackedDataset, OpenedModel]":
    """Open the data set and the model, and check that they fit.

    Raises:
        InputError: they do not; one is missing or damaged; or samples of a row see each other by design.
    """
    if checkpoint is not None and checkpoint.info.lora is not None:
        raise InputError(
            f"--load {checkpoint.path}: has adapters; merge them with tools/convert_checkpoint.py merge-lora and give "
            "that folder as --hf"
        )
    capacity, balancing = run.get("moe_expert_capacity_factor"), run.get("moe_router_load_balancing_type", ())
    if (capacity is not None and capacity >= 0) or "sinkhorn" in balancing:
        name = (
            "--moe-router-load-balancing-type sinkhorn" if "sinkhorn" in balancing else "--moe-expert-capacity-factor"
        )
        raise InputError(f"the run has {name}: which experts a token gets depends on the other samples by design")
    seq_length = options.seq_length or only_packed_length(options.data_path, packed_lengths(options.data_path))
    dataset = PackedDataset.open(options.data_path, seq_length)
    dataset.split(options.split)
    if dataset.joined:
        raise InputError(
            f"{options.data_path}: rows are cut from joined samples (--padding-mode concat), which attend to each "
            "other by design; nothing to certify"
        )
    if dataset.padded:
        raise InputError(f"{options.data_path}: each row is padded and holds one sample; nothing to certify")
    from mft_megatron.convert.serving.one_process import open_model
    from mft_megatron.training.saving import refuse_other_data

    chosen = {name: run[name] for name in KERNELS if name in run}
    chosen |= {name: value for name in KERNELS if (value := getattr(options, name, None)) is not None}
    given = {**chosen, "data_path": options.data_path, "seq_length": seq_length}
    model = open_model(None if options.hf is None else Path(options.hf), checkpoint, dtype, given)
    refuse_other_data(model.arguments, dataset)
    return dataset, model


def _options_of_run(checkpoint: CheckpointRef) -> Given:
    """Read the options of the run that wrote a checkpoint; none where its folder has no configuration."""
    file = checkpoint.path.parent / CONFIG
    return read_config_file(str(file), GROUPS, MEGATRON_ONLY)[0] if file.is_file() else {}


def _words(bounds: Bounds) -> str:
    if bounds.noisy == 0:
        return "0: the same bits"
    if bounds.others == 0:
        return f"0: the same bits; {bounds.noisy:g} where two passes over a row differ"
    return f"{bounds.others:g}"


def _line(report: RowReport) -> str:
    """A line of the table."""
    replaced = f"{report.replaced + 1} ({report.tasks[report.replaced]})"
    others = "0" if report.others == 0 else f"{report.others:.2e}"
    tasks = ", ".join(f"{name} {count}" for name, count in Counter(report.tasks).items())
    return (
        f"{report.pack:>8} {len(report.samples):>7}  {replaced:<24} {others:>9} {report.itself:>9.2e} "
        f"{report.unpacked:>9.2e}  {tasks}"
    )
