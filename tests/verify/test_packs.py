"""The certificate of packs: given by a sound engine, refused with each planted fault, and its input."""

import contextlib
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.verify.command import main
from mft_megatron.verify.packs import command, isolation
from mft_megatron.verify.packs.isolation import Bounds, RowReport, comparable_rows, compare_row
from tests.made_dataset import write_dataset
from tests.ranks import run_forked, run_on_ranks, run_tool
from tests.refusals import refused_call

LENGTH = 256
EXACT = Bounds(others=0.0, noisy=0.0, unpacked=1e-4, mean=False)
# learned positions: where they do not restart, losses change
MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --init-method-std 0.2"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("packs") / "data")
    write_dataset(prefix, LENGTH, longest=110)
    return prefix


@pytest.fixture(scope="module")
def run_folder(prefix, tmp_path_factory):
    """A run with a checkpoint, of a model that its data change noticeably."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = f"{MODEL} --micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-3 --seed 3"
    process = run_forked("pretrain_mft.py", "--data-path", prefix, "--save", folder, *words.split())
    assert process.returncode == 0, process.stderr
    return folder


def losses_of(batch):
    """A model without weights: the loss of a target depends on the tokens of its segment before it, and on itself."""
    tokens, labels = batch.tokens_BS[0], batch.labels_BS[0]
    losses = np.zeros(len(tokens))
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        losses[start:end] = np.cumsum(np.sin(tokens[start:end] + batch.position_ids_BS[0, start:end]))
    losses = 3 + np.cos(losses + labels)
    return np.where(batch.loss_mask_BS > 0, losses, 0).astype(np.float32)


def leaking(batch):
    return dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]])


def moved_borders(batch, by):
    cu_seqlens = batch.cu_seqlens.copy()
    cu_seqlens[1:-1] += by
    return dataclasses.replace(batch, cu_seqlens=cu_seqlens)


def early_borders(batch):
    """Segments that begin one token early: each sees the last token of the sample before."""
    return moved_borders(batch, -1)


def late_borders(batch):
    """Segments that begin one token late: each lacks its first token."""
    return moved_borders(batch, 1)


def running_on(batch):
    return dataclasses.replace(batch, position_ids_BS=np.arange(batch.tokens_BS.size)[None])


def labels_across(batch):
    """Labels and mask that are shifted over the whole row, not within a sample."""
    labels, shifted = np.roll(batch.tokens_BS, -1), np.roll(batch.loss_mask_BS, 1) | batch.loss_mask_BS
    return dataclasses.replace(batch, labels_BS=labels, loss_mask_BS=shifted)


def late_mask(batch):
    return dataclasses.replace(batch, loss_mask_BS=np.roll(batch.loss_mask_BS, 1))


def late_labels(batch):
    return dataclasses.replace(batch, labels_BS=np.roll(batch.labels_BS, 1))


# by name: the fault, and what the certificate says of it
FAULTS = {
    "attention leak": (leaking, "so it sees that one"),
    "borders one token early": (early_borders, "so it sees that one"),
    "borders one token late": (late_borders, "in the row and unpacked differ"),
    "positions": (running_on, "do not count from 0"),
    "labels of the next sample": (labels_across, "in the row and unpacked differ"),
    "mask off by one": (late_mask, "in the row and unpacked differ"),
    "labels off by one": (late_labels, "in the row and unpacked differ"),
}


def failures(prefix, losses=losses_of, rows=6, **options):
    dataset = PackedDataset.open(prefix, LENGTH)
    reports = [
        compare_row(losses, dataset, pack, row, index, seed=5, mean=False)
        for (pack, row, index), _ in zip(comparable_rows(dataset.split("train"), 0), range(rows), strict=False)
    ]
    assert len(reports) == rows
    return [report.failures(EXACT) for report in reports]


def test_a_sound_loader_is_certified(prefix):
    assert failures(prefix) == [[]] * 6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_loader_is_found_in_every_row(prefix, monkeypatch, fault):
    change, words = FAULTS[fault]
    sound = isolation.build_batch
    monkeypatch.setattr(isolation, "build_batch", lambda *arguments: change(sound(*arguments)))
    for found in failures(prefix):
        assert any(words in one for one in found), found


def test_losses_that_show_nothing_are_no_certificate(prefix):
    for (found,) in failures(prefix, lambda batch: (batch.loss_mask_BS > 0).astype(np.float32)):
        assert "moved by only 0.00e+00 when it was replaced, so others that do not move show nothing" in found
    for (found,) in failures(prefix, lambda batch: np.full(batch.tokens_BS.shape, np.nan, np.float32)):
        assert "losses are not finite" in found


def test_one_bit_is_a_difference_unless_a_row_is_not_repeatable():
    report = RowReport(
        **{"pack": 4, "tasks": ("a", "b"), "samples": (8, 9), "replaced": 0, "moved": 1, "others": 1e-7, "itself": 0.5},
        **{"unpacked": 2e-5, "misplaced": (), "finite": True, "repeatable": True},
    )
    on_gpu = Bounds(others=0.0, noisy=1e-5, unpacked=1e-4, mean=False)
    (found,) = report.failures(on_gpu)
    assert found == (
        "row 4: losses of sample 2 (b) moved by 1.00e-07 when sample 1 (a) was replaced, so it sees that one"
    )
    noisy = dataclasses.replace(report, repeatable=False)
    assert noisy.failures(on_gpu) == []
    assert len(noisy.failures(EXACT)) == 1
    assert len(dataclasses.replace(noisy, others=2e-5, unpacked=2e-4).failures(on_gpu)) == 2


def test_replaced_tokens_are_all_others_and_nothing_else_changes(prefix):
    dataset = PackedDataset.open(prefix, LENGTH)
    for pack, row, index in comparable_rows(dataset.split("train"), 1):
        whole = isolation.build_batch(dataset, [row])
        changed = isolation.build_batch(isolation.replace_slice(dataset, row, index, seed=2), [row])
        inside = np.flatnonzero(whole.sample_ids_BS[0] == index)
        assert np.array_equal(np.flatnonzero(whole.tokens_BS != changed.tokens_BS), inside), pack
        assert changed.tokens_BS.max() < dataset.vocab_size
        assert np.array_equal(np.flatnonzero(whole.labels_BS != changed.labels_BS), inside[:-1])
        assert np.array_equal(whole.loss_mask_BS, changed.loss_mask_BS)


def test_parts_of_a_sample_are_samples_of_their_own(tmp_path):
    write_dataset(str(tmp_path / "parts"), LENGTH, longest=600, overlong="split")
    split = PackedDataset.open(tmp_path / "parts", LENGTH).split("train")
    rows = list(comparable_rows(split, 0))
    assert any(row.starts[index] > 0 for _, row, index in rows)
    assert failures(tmp_path / "parts", rows=len(rows)) == [[]] * len(rows)


def test_weights_of_samples_and_turns_change_nothing(tmp_path):
    write_dataset(str(tmp_path / "weighted"), LENGTH, longest=110, weighted="samples turns")
    assert failures(tmp_path / "weighted") == [[]] * 6


def test_a_row_that_differs_from_itself_is_not_repeatable(prefix):
    """Kernels that sum in any order do so; in 16 bits the mean of the differences counts."""
    passes = iter(range(100))

    def noisy(batch):
        return losses_of(batch) * np.float32(1 + 1e-6 * next(passes))

    dataset = PackedDataset.open(prefix, LENGTH)
    pack, row, index = next(comparable_rows(dataset.split("train"), 0))
    exact, largest, mean = (
        compare_row(losses, dataset, pack, row, index, seed=5, mean=mean)
        for losses, mean in ((losses_of, False), (noisy, False), (noisy, True))
    )
    assert (exact.repeatable, largest.repeatable) == (True, False)
    assert 0 < largest.others < 1e-5
    assert largest.failures(EXACT)
    assert largest.failures(dataclasses.replace(EXACT, noisy=1e-5)) == []
    assert 0 < mean.unpacked < 3e-5


def test_rows_are_chosen_by_the_seed(prefix):
    split = PackedDataset.open(prefix, LENGTH).split("train")
    first, again, other = ([pack for pack, *_ in comparable_rows(split, seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    alone = [pack for pack in range(split.num_packs) if len(split.slices_of(pack).samples) < 2]
    assert not set(first) & set(alone)


def _certify(words, faults):
    """Run the command as it is and with each fault in the engine or in the loader; exit codes and outputs."""
    from unittest import mock

    from mft_megatron.mcore.parallel import device_batch

    shard_of, build_batch = device_batch.shard_of, isolation.build_batch
    replacements = {
        "none": (device_batch, "shard_of", shard_of),
        **{name: _planted(where, change, shard_of, build_batch) for name, (where, change) in faults.items()},
    }
    results = []
    for replacement in replacements.values():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), mock.patch.object(*replacement):
            results.append((command.packs(words), printed.getvalue()))
    return dict(zip(replacements, results, strict=True))


def _planted(where, change, shard_of, build_batch):
    from mft_megatron.mcore.parallel import device_batch

    if where == "engine":
        return device_batch, "shard_of", lambda batch, device: shard_of(change(batch), device)
    return isolation, "build_batch", lambda *arguments: change(build_batch(*arguments))


def test_the_engine_is_certified_and_faults_are_found(prefix, run_folder):
    """The model has learned positions; attention is computed by the segments that the shard has."""
    in_engine = ("attention leak", "borders one token early", "borders one token late")
    faults = {name: ("engine" if name in in_engine else "loader", change) for name, (change, _) in FAULTS.items()}
    results = run_on_ranks(1, _certify, [prefix, "--load", str(run_folder), "--rows", "3"], faults)[0]
    code, output = results.pop("none")
    assert code == 0, output
    *_, header, first, second, third, last = output.splitlines()
    assert header.split() == ["row", "samples", "replaced", "others", "itself", "unpacked", "tasks"]
    for row in (first, second, third):
        assert row.split()[4] == "0"
        assert float(row.split()[5]) > 1e-2
        assert float(row.split()[6]) < 1e-5
    assert last.startswith("certified: in 3 rows with ")
    assert len(results) == len(FAULTS)
    for name, (code, output) in results.items():
        last = output.splitlines()[-1]
        assert code == 1, name
        assert last.startswith("FAILED: row "), name
        assert FAULTS[name][1] in last, name
    # where positions are learned, losses also show that they do not restart
    assert "in the row and unpacked differ" in results["positions"][1].splitlines()[-1]


def _packs(*commands):
    """Run the command several times in one process; exit code, output and refusal of each."""
    from mft_megatron.errors import InputError

    results = []
    for words in commands:
        printed, code, refused = io.StringIO(), None, ""
        with contextlib.redirect_stdout(printed):
            try:
                code = command.packs([str(word) for word in words])
            except InputError as error:
                refused = str(error)
        results.append((code, printed.getvalue(), refused))
    return results


def test_models_precisions_and_kernels(prefix, run_folder, tmp_path):
    """A mixture of experts from Hugging Face, adapters alone, 16 bits, and the kernels of the run or others."""
    from tests.convert import tiny_models

    tiny_models.write_model("mixtral", tmp_path / "mixtral", vocab_size=257)
    tiny_models.write_model("llama", tmp_path / "llama", vocab_size=257)
    words = "--peft-type lora --save-adapters-only --micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-2"
    dropout = "--attention-dropout 0 --hidden-dropout 0"
    folders = ("--data-path", prefix, "--hf-checkpoint", tmp_path / "llama", "--save", tmp_path / "lora")
    process = run_forked("pretrain_mft.py", *folders, *words.split(), *dropout.split())
    assert process.returncode == 0, process.stderr
    shutil.copytree(run_folder, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "attention_backend: auto" in text
    config.write_text(text.replace("attention_backend: auto", "attention_backend: flash"))
    adapters = [prefix, "--load", tmp_path / "lora"]
    experts, base, adapted, alone, low, of_run, other = run_on_ranks(
        1,
        _packs,
        [prefix, "--hf", tmp_path / "mixtral"],
        [prefix, "--hf", tmp_path / "llama"],
        [*adapters, "--hf", tmp_path / "llama"],
        adapters,
        [prefix, "--load", run_folder, "--dtype", "bf16", "--cross-entropy-impl", "megatron"],
        [prefix, "--load", tmp_path / "run", "--dtype", "bf16"],
        [prefix, "--load", tmp_path / "run", "--attention-backend", "local", "--rows", "99", "--seed", "2"],
    )[0]
    assert [one[0] for one in (experts, base, adapted, low, other)] == [0] * 5, (experts, base, adapted, low, other)
    assert "allowed: up to 1e-05" in experts[1]
    assert "allowed: the same bits" in base[1]
    assert base[1].splitlines()[-2] != adapted[1].splitlines()[-2]  # adapters are in the model
    assert "holds only adapters; give the model that they were trained with, too: --hf DIR (it was " in alone[2]
    assert "mean between the row and its samples alone; allowed: up to 0.05" in low[1]
    assert "--attention-backend flash needs a CUDA device" in of_run[2]
    assert "note: train has no more than " in other[1]


def test_bad_input_is_one_line(prefix, run_folder, tmp_path):
    from tests.convert import tiny_models

    tiny_models.write_model("llama", tmp_path / "small", vocab_size=256)
    for name, options in {
        "padded": {"padding_mode": "padding"},
        "joined": {"padding_mode": "concat", "documents": True},
        "short": {},
    }.items():
        write_dataset(str(tmp_path / name), 60 if name == "short" else LENGTH, longest=60, **options)
    write_dataset(str(tmp_path / "long"), 2 * LENGTH)
    shutil.copytree(run_folder, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "moe_expert_capacity_factor: null" in text
    config.write_text(text.replace("moe_expert_capacity_factor: null", "moe_expert_capacity_factor: 1.5"))
    load = ["--load", run_folder]
    cases = {
        "data set": [["nothing", *load], "nothing_dataset.json"],
        "length": [[prefix, *load, "--seq-length", "64"], f"--seq-length 64: {prefix} is packed for 256"],
        "split": [[prefix, *load, "--split", "test"], "has no test split"],
        "no model": [[prefix], "give the model, --load CKPT or --hf DIR"],
        "two models": [[prefix, *load, "--hf", tmp_path / "small"], "both give a model"],
        "no checkpoint": [[prefix, "--load", tmp_path / "none"], "does not exist"],
        "vocabulary": [[prefix, "--hf", tmp_path / "small"], "made for a vocabulary of 256"],
        "padded": [[tmp_path / "padded", *load], "a row holds one sample"],
        "joined": [[tmp_path / "joined", *load], "which attend to each other by design"],
        "one sample a row": [[tmp_path / "short", *load], "no row has two samples"],
        "positions": [[tmp_path / "long", *load], "--seq-length 512 is longer than --max-position-embeddings 256"],
        "capacity": [[prefix, "--load", tmp_path / "run"], "--moe-expert-capacity-factor 1.5, so the experts of"],
        "16 bits": [[prefix, *load, "--attention-backend", "flash"], "give --dtype bf16, or --attention-backend local"],
        "folder of --json": [[prefix, *load, "--json", tmp_path / "no" / "x.json"], "its folder does not exist"],
        "rows": [[prefix, *load, "--rows", "0"], "--rows 0: must be at least 1"],
    }
    results = run_on_ranks(1, _packs, *(words for words, _ in cases.values()))[0]
    for (name, (_, words)), (code, output, refused) in zip(cases.items(), results, strict=True):
        assert words in refused, (name, code, output, refused)
        assert "\n" not in refused, name


def test_the_command_line(prefix, run_folder, tmp_path):
    file = tmp_path / "packs.json"
    process = run_tool("tools/verify.py", "packs", prefix, "--load", run_folder, "--rows", 2, "--json", file)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("certified: in 2 rows with ")
    result = json.loads(file.read_text())
    assert (result["certificate"], result["certified"], result["seq_length"]) == ("packs", True, LENGTH)
    assert result["model"] == str(run_folder / "iter_0000001")
    assert [(row["others"], row["failures"]) for row in result["rows"]] == [(0, []), (0, [])]
    assert "unknown certificate 'pack'; give one of: " in refused_call(main, ["pack"])
