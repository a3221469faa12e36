"""Packs that are left out: from plans of any batch size, exactly once an occurrence, and from files that are read."""

import json

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.training.bad_steps import left_out
from mft_megatron.training.bad_steps.left_out import LeftOut
from tests.made_dataset import write_dataset
from tests.refusals import refused


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("left_out") / "set"
    write_dataset(prefix, 256)
    return PackedDataset.open(prefix, 256).split("train")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    groups = left_out.process_groups
    monkeypatch.setattr(groups, "is_main", lambda: True)
    monkeypatch.setattr(groups, "first_of_any_rank", lambda message: message)
    monkeypatch.setattr(groups, "write_on_main", lambda place, write, consequence: write())


@pytest.mark.parametrize("batch_size", [1, 4, 6, 8, 13])
def test_exactly_the_named_packs_are_left_out_whatever_the_batch_size(split, tmp_path, batch_size):
    """The reference walks along the stream of packs one by one."""
    packs = LeftOut(tmp_path, "stream")
    packs.add(step=2, first=8, packs=8, checkpoint=1, reason="")
    packs.add(step=5, first=30, packs=3, checkpoint=4, reason="")
    end, consumed, used, missing = 3 * split.num_packs, 0, [], []
    while consumed < end:
        plan = plan_step(split, seed=3, global_batch_size=batch_size, consumed_samples=consumed, end=end)
        kept, out = packs.divide(split, plan, consumed)
        positions = np.arange(consumed, consumed + len(plan.packs_G))
        of_kept = kept.packs_G >= 0
        used += positions[of_kept].tolist()
        assert (kept.packs_G[of_kept] == plan.packs_G[of_kept]).all()
        assert kept.counts.tokens_K.tolist() == split.counts(plan.packs_G[of_kept]).tokens_K.tolist()
        assert (kept.costs_G[~of_kept] == 0).all()
        if out is None:
            assert kept is plan
        else:
            of_out = out.packs_G >= 0
            missing += positions[of_out].tolist()
            assert not (of_out & of_kept).any()
            assert kept.num_packs + out.num_packs == plan.num_packs
        consumed += plan.num_packs
    wanted = [*range(8, 16), *range(30, 33)]
    assert missing == wanted
    assert used == [position for position in range(end) if position not in wanted]


def test_the_list_is_that_of_the_file_and_the_checkpoint_without_other_streams(tmp_path):
    first = LeftOut(tmp_path, "one")
    first.add(step=2, first=8, packs=8, checkpoint=1, reason="nan")
    of_checkpoint = first.state()
    first.add(step=4, first=24, packs=8, checkpoint=3, reason="nan")
    second = LeftOut(tmp_path, "one")
    second.load(of_checkpoint)
    assert second.batches == first.batches
    # a checkpoint that was copied elsewhere, without the file
    third = LeftOut(None, "one")
    third.load(of_checkpoint)
    assert third.batches == first.batches[:1]
    # another seed: not used, and not lost
    other = LeftOut(tmp_path, "two")
    other.load([])
    assert other.batches == []
    other.add(step=1, first=0, packs=4, checkpoint=0, reason="inf")
    assert [batch["stream"] for batch in json.loads((tmp_path / "left_out.json").read_text())] == ["one", "one", "two"]


WRONG = '[{"first": "1", "packs": 2, "step": 3, "checkpoint": 4, "reason": "nan", "stream": "one"}]'


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"first": 1}]', "3", "\xff", WRONG])
def test_a_damaged_list_is_refused(tmp_path, text):
    (tmp_path / "left_out.json").write_bytes(text.encode("latin-1"))
    with refused("left_out.json: no list of left-out batches", "remove it"):
        LeftOut(tmp_path, "one").load([])
