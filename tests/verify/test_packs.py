"""The certificate of packs: given by a sound engine, refused with each planted fault, and its input."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.verify import pack_isolation, packs_command
from mft_megatron.verify.pack_isolation import Bounds, comparable_rows, compare_row
from tests.made_dataset import write_dataset
from tests.ranks import run_forked, run_on_ranks
from tests.refusals import refusal

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
    sound = pack_isolation.build_batch
    monkeypatch.setattr(pack_isolation, "build_batch", lambda *arguments: change(sound(*arguments)))
    for found in failures(prefix):
        assert any(words in one for one in found), found


def test_losses_that_show_nothing_are_no_certificate(prefix):
    for (found,) in failures(prefix, lambda batch: (batch.loss_mask_BS > 0).astype(np.float32)):
        assert "moved by only 0.00e+00 when it was replaced, so others that do not move show nothing" in found
    for (found,) in failures(prefix, lambda batch: np.full(batch.tokens_BS.shape, np.nan, np.float32)):
        assert "losses are not finite" in found


def test_replaced_tokens_are_all_others_and_nothing_else_changes(prefix):
    dataset = PackedDataset.open(prefix, LENGTH)
    for pack, row, index in comparable_rows(dataset.split("train"), 1):
        whole = pack_isolation.build_batch(dataset, [row])
        changed = pack_isolation.build_batch(pack_isolation.replace_slice(dataset, row, index, seed=2), [row])
        inside = np.flatnonzero(whole.sample_ids_BS[0] == index)
        assert np.array_equal(np.flatnonzero(whole.tokens_BS != changed.tokens_BS), inside), pack
        assert changed.tokens_BS.max() < dataset.vocab_size
        assert np.array_equal(np.flatnonzero(whole.labels_BS != changed.labels_BS), inside[:-1])
        assert np.array_equal(whole.loss_mask_BS, changed.loss_mask_BS)


def test_rows_are_chosen_by_the_seed(prefix):
    split = PackedDataset.open(prefix, LENGTH).split("train")
    first, again, other = ([pack for pack, *_ in comparable_rows(split, seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    alone = [pack for pack in range(split.num_packs) if len(split.slices_of(pack).samples) < 2]
    assert not set(first) & set(alone)


def _certify(words, faults):
    """Run the command as it is and with each fault in the engine; exit codes and outputs."""
    from unittest import mock

    from mft_megatron.mcore.parallel import device_batch

    results = []
    shard_of = device_batch.shard_of
    for name, change in {"none": lambda batch: batch, **faults}.items():
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            mock.patch.object(device_batch, "shard_of", lambda batch, device, c=change: shard_of(c(batch), device)),
        ):
            results.append((name, packs_command.packs(words), printed.getvalue()))
    return results


def test_the_engine_is_certified_and_a_leak_of_attention_is_found(prefix, run_folder):
    words = [prefix, "--load", str(run_folder), "--rows", "3"]
    names = ("attention leak", "borders one token early", "borders one token late")
    results = run_on_ranks(1, _certify, words, {name: FAULTS[name][0] for name in names})[0]
    (_, code, output), *faulty = results
    assert code == 0, output
    assert output.splitlines()[-1].startswith("certified: in 3 row(s) with ")
    for name, code, output in faulty:
        assert code == 1, name
        assert output.splitlines()[-1].startswith("FAILED: row "), name
        assert FAULTS[name][1] in output.splitlines()[-1], name


def test_the_command_line(prefix, run_folder, tmp_path):
    process = run_forked(
        *("tools/verify.py", "packs", prefix, "--load", run_folder, "--rows", 2, "--json", tmp_path / "packs.json")
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "packs.json").read_text())
    assert result["certified"] is True
    assert len(result["rows"]) == 2
    process = run_forked("tools/verify.py", "packs", prefix, "--load", run_folder, "--seq-length", 512)
    assert "--seq-length 512" in refusal(process)
