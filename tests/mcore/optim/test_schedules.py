"""Learning rate and weight decay by optimizer step equal formulas written here, and act on weights as they should."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.mcore.optim.optimizer import build_scheduler, learning_rate
from tests.ranks import run_on_ranks

BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --data-path none --seq-length 32 --micro-batch-size 1 "
    "--clip-grad 0"
)
SHORT = f"{BASE} --train-iters 10 --lr 1e-3"
DECAYS = ("constant", "linear", "cosine", "inverse-square-root")
WSD_DECAYS = ("exponential", "linear", "cosine", "minus_sqrt")


def scheduled(extra, steps):
    """Learning rate and weight decay of each step."""
    optimizer = types.SimpleNamespace(param_groups=[{"default_config": True}])
    scheduler = build_scheduler(parse_arguments(f"{BASE} {extra}".split()), optimizer)
    pairs = []
    for _ in range(steps):
        pairs.append((learning_rate(optimizer), optimizer.param_groups[0]["weight_decay"]))
        scheduler.step(1)
    return zip(*pairs, strict=True)


def remaining(style, part):
    """Fraction of the distance from the peak to the lowest rate that remains after this fraction of the decay steps."""
    return {
        "linear": 1 - part,
        "cosine": math.cos(part * math.pi / 2) ** 2,
        "exponential": 2 ** (1 - part) - 1,
        "minus_sqrt": 1 - part**0.5,
    }[style]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_decay_is_its_formula(data):
    style = data.draw(st.sampled_from([*DECAYS, *(f"WSD {kind}" for kind in WSD_DECAYS)]))
    decay = data.draw(st.integers(2, 40))
    warmup, iters = data.draw(st.integers(0, decay - 1)), data.draw(st.integers(1, 60))
    last = data.draw(st.integers(1, decay - warmup))
    peak = data.draw(st.floats(1e-6, 1))
    lowest, init = (peak * data.draw(st.floats(0, 1)) for _ in range(2))
    words = f"--lr {peak!r} --lr-decay-iters {decay} --train-iters {iters} --lr-warmup-iters {warmup}"
    words += f" --lr-decay-style {style.split()[0]}"
    words += f" --min-lr {lowest!r}" if style != "constant" else ""
    words += f" --lr-warmup-init {init!r}" if warmup else ""
    words += f" --lr-wsd-decay-style {style.split()[1]} --lr-wsd-decay-iters {last}" if "WSD" in style else ""

    def expected(n):
        if n <= warmup and warmup:
            return init + (peak - init) * n / warmup
        if style == "constant":
            return peak
        if n > decay:
            return lowest
        if style == "inverse-square-root":
            return max(lowest, peak * math.sqrt(max(warmup, 1) / max(n, 1)))
        if "WSD" in style:
            left = remaining(style.split()[1], max(n - (decay - last), 0) / last)
        else:
            left = remaining(style, (n - warmup) / (decay - warmup))
        return lowest + (peak - lowest) * left

    rates, _ = scheduled(words, 65)
    assert rates == pytest.approx([expected(n) for n in range(65)], rel=1e-12, abs=1e-18)


def test_a_cosine_reaches_its_lowest_rate_and_stays_there():
    words = "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 10 --lr-decay-iters 30 --train-iters 40"
    rates, _ = scheduled(words, 60)
    assert (rates[0], rates[5], rates[10]) == (0.0, 0.0005, 0.001)
    assert rates[20] == pytest.approx(0.00055, rel=1e-15)
    assert rates[29] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * 0.95)) / 2)
    assert set(rates[30:]) == {1e-4}


def test_the_last_step_of_a_run_is_one_step_before_the_lowest_rate():
    rates, _ = scheduled("--lr 1 --lr-decay-style linear --train-iters 4", 5)
    assert rates == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_a_fraction_of_the_decay_steps_is_not_rounded():
    """0.29 × 100 is 28.999999999999996."""
    rates, _ = scheduled("--lr 1 --lr-warmup-fraction 0.29 --train-iters 100 --lr-decay-style cosine", 31)
    assert rates[28] == pytest.approx(28 / 29)
    assert rates[29] == pytest.approx(1.0)
    assert rates[30] < 1
    halfway, _ = scheduled("--lr 1 --lr-warmup-fraction 0.25 --train-iters 10", 4)
    assert halfway == pytest.approx([0, 0.4, 0.8, 1 - 0.5 / 7.5])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 30), st.floats(0, 0.5), st.floats(0, 0.5))
def test_weight_decay_grows_over_the_run(style, iters, start, more):
    end = start + more
    words = f"--lr 1 --train-iters {iters} --lr-decay-iters 7 --weight-decay-incr-style {style}"
    _, decays = scheduled(f"{words} --start-weight-decay {start!r} --end-weight-decay {end!r}", 40)
    expected = [end - (end - start) * remaining(style, min(n / iters, 1)) for n in range(40)]
    assert decays == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_weight_decay_is_constant_by_default():
    assert set(list(scheduled("--lr 1 --train-iters 5 --weight-decay 0.3", 8))[1]) == {0.3}
    assert set(list(scheduled("--lr 1 --train-iters 5", 8))[1]) == {0.01}


# --- the parameters of a model ---


def _with_trainer(work, extra, world_size, *more):
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = parse_arguments(f"{SHORT} {extra}".split(), world_size)
    with process_groups.process_groups(arguments.distributed, 1):
        return work(lambda: Trainer(arguments, 100, 1), *more)


def _weights(trainer):
    return {name: weight for chunk in trainer.chunks for name, weight in chunk.module.named_parameters()}


def _groups(make):
    trainer = make()
    names = {id(weight): name for name, weight in _weights(trainer).items()}
    return [
        (group["wd_mult"], group["max_lr"], group["min_lr"], {names[id(weight)] for weight in group["params"]})
        for group in trainer.optimizer.param_groups
    ]


def _update(trainer, seed=0):
    """Run an optimizer step on random gradients."""
    import torch

    for number, weight in enumerate(_weights(trainer).values()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        weight.main_grad.copy_(torch.randn(weight.shape, generator=generator))
    trainer.optimizer.step()
    trainer.scheduler.step(1)


def _first_updates(make, steps):
    trainer = make()
    values = []
    for step in range(steps):
        values.append({name: weight.detach().double().numpy().copy() for name, weight in _weights(trainer).items()})
        _update(trainer, step)
    values.append({name: weight.detach().double().numpy().copy() for name, weight in _weights(trainer).items()})
    return values


def test_biases_and_norms_have_no_weight_decay():
    (decayed, free) = run_on_ranks(1, _with_trainer, _groups, "--qk-layernorm", 1)[0]
    assert (decayed[0], free[0]) == (1.0, 0.0)
    assert len(decayed[3]) == 2 + 2 * 4  # word and position embeddings; four matrices of each layer
    assert all(name.endswith(".bias") or "layernorm" in name for name in free[3])
    assert not any(name.endswith(".bias") or "layernorm" in name for name in decayed[3])
    assert {"decoder.final_layernorm.weight", "decoder.layers.1.mlp.linear_fc2.bias"} < free[3]


def test_norms_of_queries_and_keys_may_have_it():
    extra = "--qk-layernorm --apply-wd-to-qk-layernorm"
    (decayed, free) = run_on_ranks(1, _with_trainer, _groups, extra, 1)[0]
    norms = {name for name in decayed[3] | free[3] if "q_layernorm" in name or "k_layernorm" in name}
    assert len(norms) == 2 * 2 * 2
    assert norms == {name for name in decayed[3] if "layernorm" in name}
    assert "decoder.layers.0.input_layernorm.weight" in free[3]


def test_weight_decay_shrinks_weights_as_scheduled():
    """With AdamW, two runs that differ only in weight decay differ by rate × decay × weight after a step."""
    growth = "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.6"
    words = f"{growth} --lr 0.125 --lr-decay-style constant"
    plain = run_on_ranks(
        1, _with_trainer, _first_updates, "--weight-decay 0 --lr 0.125 --lr-decay-style constant", 1, 2
    )
    grown = run_on_ranks(1, _with_trainer, _first_updates, words, 1, 2)
    matrices = 0
    for step, decay in enumerate((0.1, 0.15)):
        for name, before in grown[0][step].items():
            ours = grown[0][step + 1][name] - before
            theirs = plain[0][step + 1][name] - plain[0][step][name]
            expected = -0.125 * decay * before if before.ndim > 1 else np.zeros_like(before)
            np.testing.assert_allclose(ours - theirs, expected, atol=2e-7, err_msg=f"{name}, step {step}")
            matrices += before.ndim > 1 and np.abs(expected).max() > 1e-4
    assert matrices == 2 * 10


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_output_layer_may_have_a_separate_rate(tied):
    words = "--pipeline-model-parallel-size 2 --decoupled-lr 4e-3 --decoupled-min-lr 1e-3 --min-lr 5e-4"
    words += "" if tied else " --untie-embeddings-and-output-weights"
    first, last = run_on_ranks(2, _with_trainer, _groups, words, 2)
    assert [group[:3] for group in first] == [group[:3] for group in last]
    assert [group[:3] for group in first] == [(1.0, 1e-3, 5e-4), (1.0, 4e-3, 1e-3), (0.0, 1e-3, 5e-4)]
    assert (first[1][3], last[1][3]) == ({"embedding.word_embeddings.weight"}, {"output_layer.weight"})


def test_without_a_separate_lowest_rate_they_have_the_common_one():
    groups = run_on_ranks(1, _with_trainer, _groups, "--decoupled-lr 4e-3 --min-lr 5e-4", 1)[0]
    assert [group[1:3] for group in groups] == [(1e-3, 5e-4), (4e-3, 5e-4), (1e-3, 5e-4)]


def test_their_rate_changes_them_and_no_other_weight():
    """Adam's first steps change each element by the learning rate."""
    words = "--weight-decay 0 --lr-decay-style linear"
    plain = run_on_ranks(1, _with_trainer, _first_updates, words, 1, 2)[0]
    separate = run_on_ranks(1, _with_trainer, _first_updates, f"{words} --decoupled-lr 4e-3", 1, 2)[0]
    for step in range(2):
        for name, before in plain[step].items():
            factor = 4.0 if name == "embedding.word_embeddings.weight" else 1.0
            ours, theirs = separate[step + 1][name] - separate[step][name], plain[step + 1][name] - before
            np.testing.assert_allclose(ours, factor * theirs, atol=5e-7, err_msg=f"{name}, step {step}")
            assert np.abs(theirs).max() > 5e-4, name


def _save_and_resume(make, folder):
    """Weights and rates of a third step, and of the third step after resuming from a checkpoint of the second."""
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.run_folder.description import CheckpointInfo

    trainer = make()
    _update(trainer, 0), _update(trainer, 1)
    info = CheckpointInfo(2, 16, {}, 1, {}, "", 1, 8, layout=process_groups.parallel_layout())
    path = checkpoint.save(Path(folder), trainer, info, trainer.arguments.checkpoint)
    again = make()
    checkpoint.load(path, again, info, again.arguments.checkpoint)
    results = []
    for run in (trainer, again):
        rates = [(group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups]
        _update(run, 2)
        results.append((rates, {name: weight.detach().float().numpy() for name, weight in _weights(run).items()}))
    return results


@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_groups_are_resumed_from_a_checkpoint(tmp_path, precision):
    words = "--decoupled-lr 4e-3 --lr-decay-style WSD --lr-wsd-decay-iters 9 --weight-decay-incr-style cosine"
    words += f" --start-weight-decay 0 --end-weight-decay 0.5 {precision}"
    (rates, weights), (again, weights_again) = run_on_ranks(
        1, _with_trainer, _save_and_resume, words, 1, str(tmp_path)
    )[0]
    assert rates == again
    assert rates[1][0] == 4 * rates[0][0] > 0
    assert rates[0][0] < 1e-3
    assert rates[0][1] > rates[2][1] == 0
    for name, value in weights.items():
        np.testing.assert_array_equal(weights_again[name], value, name)
