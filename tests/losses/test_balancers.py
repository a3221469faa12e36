"""Balancers against docs/LOSSES.md §4 written out in numpy (balancer_reference.py), and their properties."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.losses.balancers.coba import Coba
from mft_megatron.losses.balancers.famo import Famo
from mft_megatron.losses.balancers.participation import mean_for_others
from mft_megatron.losses.balancers.self_paced import SelfPaced
from mft_megatron.losses.balancers.table import BALANCERS
from tests.losses.balancer_reference import GOLDEN, GOLDEN_FOLDER, famo, reference, slope, softmax

# name of the case: balancer, options, steps between draws
CASES = {
    "self-paced": ("self-paced", {"history_length": 8}, 1),
    "self-paced, two draws": ("self-paced", {"history_length": 2, "scale_factor": 3.0}, 4),
    "famo": ("famo", {}, 1),
    "famo, other Adam": ("famo", {"lr": 0.4, "weight_decay": 0.3, "beta1": 0.5, "beta2": 0.7}, 3),
    "famo, no decay": ("famo", {"lr": 0.1, "weight_decay": 0.0, "beta1": 0.0}, 1),
    "coba": ("coba", {"warmup_steps": 5, "history_length": 12}, 1),
    "coba, short history": ("coba", {"warmup_steps": 11, "history_length": 4, "tau": 2.0}, 1),
    "coba, every third step": ("coba", {"warmup_steps": 10, "history_length": 7}, 3),
    "coba, no warm-up": ("coba", {"warmup_steps": 0, "history_length": 9}, 1),
    "coba release": ("coba", {"warmup_steps": 5, "history_length": 12, "variant": "release"}, 1),
    "coba release, short history": ("coba", {"warmup_steps": 10, "history_length": 4, "variant": "release"}, 3),
    "coba release, no warm-up": ("coba", {"warmup_steps": 0, "history_length": 9, "variant": "release"}, 1),
}
# No history in these is longer than a few draws, so that a short sequence goes through every phase.
SMALL = {
    "self-paced": SelfPaced(history_length=3),
    "famo": Famo(),
    "coba": Coba(warmup_steps=2, history_length=3),
    "coba release": Coba(warmup_steps=2, history_length=3, variant="release"),
}
SLOPED = [name for name in SMALL if name != "famo"]
every_small = pytest.mark.parametrize("balancer", SMALL.values(), ids=SMALL)
every_sloped = pytest.mark.parametrize("balancer", [SMALL[name] for name in SLOPED], ids=SLOPED)


def fp64(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def snapshot(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def check_weights(weight_K, took_part_K, tasks):
    assert weight_K.shape == took_part_K.shape == (tasks,)
    assert weight_K.dtype == torch.float64
    assert took_part_K.dtype == torch.bool
    assert torch.isfinite(weight_K).all(), weight_K
    assert (weight_K >= 0).all(), weight_K
    assert float(weight_K.sum()) == pytest.approx(1.0, abs=1e-12)


def run(balancer, loss_TK, first_loss_K=None, step_T=None):
    """The weights, and which tasks took part, after each draw; checks all that must hold for any losses."""
    loss_TK = np.asarray(loss_TK, np.float64)
    draws, tasks = loss_TK.shape
    first_loss_K = np.ones(tasks) if first_loss_K is None else first_loss_K
    step_T = range(draws) if step_T is None else step_T
    whole_split_K = fp64(first_loss_K)
    state = balancer.begin(tasks, whole_split_K if balancer.needs_first_losses else None)
    whole_split_K.fill_(math.nan)  # the caller may overwrite its tensors
    weights, took_part = [], []
    for step, loss_K in zip(step_T, loss_TK, strict=True):
        before = snapshot(state)
        given_K = fp64(loss_K)
        old, (state, weight_K, took_part_K) = state, balancer.update(state, given_K, int(step))
        assert old.keys() == before.keys()
        assert all(torch.equal(old[name], before[name]) for name in old), "update modified the state passed in"
        check_weights(weight_K, took_part_K, tasks)
        assert all(tensor.device.type == "cpu" for tensor in state.values())
        assert not any(torch.isnan(tensor).any() for tensor in state.values() if tensor.is_floating_point())
        weights.append(weight_K.clone())
        took_part.append(took_part_K.clone())
        given_K.fill_(math.nan)
        weight_K.fill_(math.nan)
    return torch.stack(weights), torch.stack(took_part)


def curves(kind, seed, draws, tasks):
    """Loss curves, and the losses over the whole validation split before the first step."""
    rng = np.random.default_rng(seed)
    k = np.arange(draws)[:, None]
    start_K = rng.uniform(0.5, 8.0, tasks)
    noise_TK = rng.normal(0, 0.01, (draws, tasks))
    if kind == "converging":
        loss_TK = start_K * (0.2 + 0.8 * np.exp(-k / rng.uniform(3, 60, tasks))) + noise_TK
    elif kind == "diverging":  # half of the tasks turn upward on the way
        turn_K = np.where(np.arange(tasks) % 2, rng.integers(2, draws, tasks), draws)
        fall_TK = 0.4 + 0.6 * np.exp(-k / 10)
        loss_TK = start_K * (fall_TK + rng.uniform(0.01, 0.2, tasks) * np.maximum(k - turn_K, 0)) + noise_TK
    else:
        loss_TK = start_K * np.exp(rng.normal(0, 0.5, (draws, tasks)))
    return np.maximum(loss_TK, 0.05), start_K * rng.uniform(0.9, 1.1, tasks)


def reference_run(name, loss_TK, step_T, first_loss_K, at=None, **options):
    at = range(len(loss_TK)) if at is None else at
    results = [reference(name, loss_TK[: d + 1], step_T[: d + 1], first_loss_K, **options) for d in at]
    return np.stack([weights for weights, _ in results]), np.stack([took_part for _, took_part in results])


def assert_same(result, expected, rtol=1e-9):
    for draw, (weight_K, expected_K) in enumerate(zip(result[0].numpy(), expected[0], strict=True)):
        np.testing.assert_allclose(weight_K, expected_K, rtol=rtol, atol=1e-18, err_msg=f"draw {draw}")
    np.testing.assert_array_equal(result[1].numpy(), expected[1])


# Against the reference, draw by draw


@pytest.mark.parametrize(
    ("tasks", "kind"),
    [(2, "noisy"), (3, "converging"), (3, "diverging"), (3, "noisy"), (7, "diverging"), (50, "converging")],
)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_at_every_draw(case, tasks, kind):
    name, options, interval = CASES[case]
    loss_TK, first_loss_K = curves(kind, seed=tasks, draws=25, tasks=tasks)
    step_T = interval * np.arange(25)
    expected = reference_run(name, loss_TK, step_T, first_loss_K, **options)
    result = run(BALANCERS[name](update_interval=interval, **options), loss_TK, first_loss_K, step_T)
    assert_same(result, expected)
    assert not np.allclose(expected[0][-1], 1 / tasks)  # or the comparison would be empty


@pytest.mark.parametrize("seed", range(3))
def test_famo_with_lowest_losses_equals_the_reference(seed):
    """Some draws are below the lowest loss, where D is eps and log D moves by 18."""
    loss_TK, first_loss_K = curves("noisy", seed, draws=40, tasks=5)
    min_losses = (0.0, *np.quantile(loss_TK[:, 1:], 0.3, axis=0).tolist())
    assert (loss_TK < min_losses).any(axis=0).tolist() == [False, True, True, True, True]
    expected = reference_run("famo", loss_TK, np.arange(40), first_loss_K, min_losses=min_losses)
    assert_same(run(Famo(min_losses=min_losses), loss_TK), expected)


@pytest.mark.parametrize(
    ("name", "options", "at"),
    [
        ("self-paced", {}, [0, 98, 99, 100, 150, 249]),
        ("famo", {}, [0, 1, 99, 100, 249]),
        ("coba", {}, [0, 99, 100, 101, 150, 198, 199, 200, 249, 300, 301, 319]),
        ("coba", {"variant": "release"}, [99, 100, 101, 199, 200, 319]),
    ],
    ids=["self-paced", "famo", "coba", "coba release"],
)
def test_the_defaults_are_those_of_the_document(name, options, at):
    """Windows of 100 and 200 draws, warm-up of 100 steps: the reference has its own defaults."""
    loss_TK, first_loss_K = curves("diverging", 5, draws=at[-1] + 1, tasks=3)
    steps = np.arange(at[-1] + 1)
    result = run(BALANCERS[name](**options), loss_TK, first_loss_K)
    expected = reference_run(name, loss_TK, steps, first_loss_K, at, **options)
    assert_same((result[0][at], result[1][at]), expected)


@st.composite
def steplike_losses(draw):
    """Losses in eighths, tasks often flat for a while: equal losses, slopes of exactly 0, tasks that come and go.

    All sums of a slope are exact here, so that "exactly 0" means the same on both sides.
    """
    tasks, draws = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    level = st.integers(0, 16)
    columns = []
    for _ in range(tasks):
        column = []
        while len(column) < draws:
            column += [draw(level)] * draw(st.integers(1, 6))
        columns.append(column[:draws])
    return np.array(columns, np.float64).T / 8


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(loss_TK=steplike_losses(), history_length=st.integers(1, 5), warmup_steps=st.integers(0, 4))
def test_equals_the_reference_where_curves_are_flat_for_a_while(name, loss_TK, history_length, warmup_steps):
    options = {}
    if name.startswith("coba"):
        variant = "release" if name.endswith("release") else "paper"
        options = {"history_length": history_length, "warmup_steps": warmup_steps, "variant": variant}
    elif name == "self-paced":
        options = {"history_length": history_length, "scale_factor": 2.0}
    name = name.split()[0]
    first_loss_K = np.array([1.0, 2.0, 0.5, 4.0])[: loss_TK.shape[1]]
    expected = reference_run(name, loss_TK, np.arange(len(loss_TK)), first_loss_K, **options)
    assert_same(run(BALANCERS[name](**options), loss_TK, first_loss_K), expected)


@pytest.mark.parametrize("file", GOLDEN)
def test_reproduces_the_golden_file(file):
    name, options, interval = GOLDEN[file]
    lines = [line for line in (GOLDEN_FOLDER / file).read_text().splitlines() if not line.startswith("#")]
    first_loss_K = np.array(lines[0].split()[1:], float)
    steps, losses, weights = [], [], []
    for line in lines[1:]:
        left, right = line.split(" | ")
        step, *loss_K = left.split()
        steps.append(int(step))
        losses.append([float(loss) for loss in loss_K])
        weights.append([float(weight) for weight in right.split()])
    assert steps == list(range(0, 50 * interval, interval))
    result, _ = run(BALANCERS[name](update_interval=interval, **options), losses, first_loss_K, steps)
    np.testing.assert_allclose(result.numpy(), weights, rtol=1e-9, atol=1e-18)


# The reference itself


def test_slope_of_the_reference_is_the_least_squares_slope():
    y_TK = np.random.default_rng(0).uniform(0, 3, (23, 4))
    np.testing.assert_allclose(slope(y_TK), np.polyfit(np.arange(23), y_TK, 1)[0], rtol=1e-12)
    assert (slope(np.full((23, 4), 0.1)) == 0).all()


def test_famo_of_the_reference_is_autograd_and_the_adam_of_torch():
    loss_TK, _ = curves("noisy", 1, draws=25, tasks=4)
    xi_K = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi_K], lr=0.025, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    log_TK = torch.log(fp64(loss_TK) + 1e-8)
    for draw in range(1, 25):
        adam.zero_grad()
        (torch.softmax(xi_K, 0) @ (log_TK[draw - 1] - log_TK[draw])).backward()
        adam.step()
    expected_K = torch.softmax(xi_K.detach(), 0) / torch.exp(log_TK[-1])
    np.testing.assert_allclose(famo(loss_TK)[0], expected_K / expected_K.sum(), rtol=1e-10)


# By hand


def test_self_paced_by_hand():
    """Slopes +1 and -1, so n = (1, -1): the task that falls gets more."""
    up = 1 / (1 + math.exp(-2))
    gap = -up - (1 - up)
    result, _ = run(SelfPaced(history_length=2, scale_factor=1.0), [[1, 2], [2, 1]])
    assert result[0].tolist() == [0.5, 0.5]
    assert result[1].tolist() == pytest.approx([1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(gap))], rel=1e-14)


def test_famo_by_hand():
    """At first 1/L; the first step of Adam moves every logit by lr, toward the task that improves least."""
    result, _ = run(Famo(weight_decay=0.0), [[1, 3], [1, 1.5]])
    assert result[0].tolist() == pytest.approx([0.75, 0.25], rel=1e-7)
    odds = math.exp(2 * 0.025) * 1.5
    assert result[1].tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds)], rel=1e-6)


def test_coba_by_hand():
    """At the first slope DF is 1, so the weights are the relative score, softmax(1, -1). Ratios count, not losses."""
    balancer = Coba(warmup_steps=1)
    result, took_part = run(balancer, [[4, 3], [8, 2]], first_loss_K=np.array([4.0, 1.0]), step_T=[0, 1])
    assert result[0].tolist() == [0.5, 0.5]
    assert result[1].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))], rel=1e-14)
    assert took_part.all()


def test_coba_release_by_hand():
    """The paper's weights, then the softmax of N times those; if one is below 1 / 10N, all are moved above it."""
    balancer = Coba(warmup_steps=1, variant="release")
    losses = [[1.0, 1.0, 1.0], [4.0, 0.5, 0.5]]
    plain_K = softmax(3 * softmax(3 * np.array([3, -0.5, -0.5]) / 4))
    assert plain_K.min() > 1 / 30
    assert run(balancer, losses)[0][1].tolist() == pytest.approx(plain_K.tolist(), rel=1e-14)
    losses = [[1.0, 1.0, 1.0, 1.0], [10.0, 0.9, 0.9, 0.9]]
    plain_K = softmax(4 * softmax(4 * np.array([9, -0.1, -0.1, -0.1]) / 9.3))
    assert plain_K.min() < 1 / 40
    assert run(balancer, losses)[0][1].tolist() == pytest.approx((0.9 * plain_K + 1 / 40).tolist(), rel=1e-14)


def test_mean_for_others():
    yes_no = torch.tensor([True, False, True])
    result = mean_for_others(fp64([0.2, 0.6]), yes_no)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([0.2 / 1.2, 0.4 / 1.2, 0.6 / 1.2], rel=1e-15)
    assert mean_for_others(fp64([0.2, 0.8]), torch.tensor([True, True])).tolist() == [0.2, 0.8]
    assert mean_for_others(fp64([]), torch.zeros(4, dtype=torch.bool)).tolist() == [0.25] * 4


# Who takes part


@every_sloped
def test_all_flat_gives_equal_weights_and_no_task_takes_part(balancer):
    result, took_part = run(balancer, [[1.0, 0.1, 3.0]] * 8)
    assert (result == 1 / 3).all()
    assert took_part[:2].all()  # before the history is full, or in warm-up
    assert not took_part[2:].any()


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_flat_curve_has_a_slope_of_exactly_zero_whatever_the_window(variant):
    """0.1 / 0.3 has no finite binary form: a sum that is not measured from the first point leaves a rounding error."""
    result, took_part = run(Coba(warmup_steps=1, variant=variant), [[0.1, 0.7, 1.1]] * 60, np.array([0.3, 0.9, 1.3]))
    assert (result == 1 / 3).all()
    assert not took_part[1:].any()


@pytest.mark.parametrize("name", SLOPED)
def test_small_changes_of_large_losses_count(name):
    loss_TK, _ = curves("noisy", 12, draws=20, tasks=3)
    loss_TK = 1e6 + 1e-2 * loss_TK
    options = {"history_length": 12} if name == "self-paced" else {"history_length": 12, "warmup_steps": 5}
    if name == "coba release":
        options["variant"] = "release"
    name = name.split()[0]
    expected = reference_run(name, loss_TK, np.arange(20), np.ones(3), **options)
    assert_same(run(BALANCERS[name](**options), loss_TK), expected)


@every_sloped
def test_the_others_are_weighted_as_if_the_flat_task_were_not_there(balancer):
    loss_TK, first_loss_K = curves("noisy", 3, draws=9, tasks=4)
    loss_TK[:, 1] = 70.0  # the largest ratio of all, which must not matter
    without_it, _ = run(balancer, loss_TK[:, [0, 2, 3]], first_loss_K[[0, 2, 3]])
    result, took_part = run(balancer, loss_TK, first_loss_K)
    assert (took_part[2:] == torch.tensor([True, False, True, True])).all()
    torch.testing.assert_close(result[:, 1], fp64([0.25] * 9), rtol=1e-12, atol=0)
    torch.testing.assert_close(result[:, [0, 2, 3]], 0.75 * without_it, rtol=1e-12, atol=0)


def test_self_paced_includes_a_task_when_its_window_moves_and_drops_it_when_it_is_flat():
    loss_TK = np.stack([np.arange(9.0, 0.0, -1), [2, 2, 2, 2, 1, 1, 1, 1, 1]], axis=1)
    _, took_part = run(SMALL["self-paced"], loss_TK)
    assert took_part[:, 0].all()
    assert took_part[:, 1].tolist() == [True, True, False, False, True, True, False, False, False]


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_coba_drops_a_task_when_the_last_slopes_are_all_zero(variant):
    """The window of ratios is flat from draw 6, and the last of the slopes that is not 0 leaves at draw 8."""
    loss_TK = np.stack([np.arange(11.0, 0.0, -1), [2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]], axis=1)
    _, took_part = run(Coba(warmup_steps=2, history_length=3, variant=variant), loss_TK)
    assert took_part[:, 0].all()
    assert took_part[:, 1].tolist() == [True, True, False, False, True, True, True, True, False, False, False]


def test_self_paced_with_a_slope_of_zero_on_a_curve_that_moves():
    """Up and down again: it takes part, n is 0, and so is its score."""
    result, took_part = run(SMALL["self-paced"], [[1, 2], [2, 3], [1, 2]])
    assert took_part.all()
    assert result[2].tolist() == [0.5, 0.5]
    result, took_part = run(SelfPaced(history_length=3, scale_factor=1.0), [[1, 3], [2, 2], [1, 1]])
    assert took_part.all()
    score = 2 / (1 + math.exp(2))  # n = (0, -2)
    assert result[2].tolist() == pytest.approx([1 / (1 + math.exp(score)), 1 / (1 + math.exp(-score))], rel=1e-14)


def test_coba_with_a_slope_of_zero_on_a_curve_that_moves_does_not_take_part():
    _, took_part = run(Coba(warmup_steps=2, history_length=3), [[1, 3], [2, 2], [1, 1]])
    assert took_part[2].tolist() == [False, True]


@pytest.mark.parametrize("balancer", [SelfPaced(history_length=1), Coba(warmup_steps=1, history_length=1)])
def test_windows_of_one_point_have_no_slope(balancer):
    loss_TK, _ = curves("noisy", 2, draws=6, tasks=3)
    result, took_part = run(balancer, loss_TK)
    assert (result == 1 / 3).all()
    assert not took_part[1:].any()


@pytest.mark.parametrize("interval", [1, 3])
def test_warm_up_counts_steps_and_the_first_weights_use_the_ratios_before(interval):
    loss_TK, _ = curves("noisy", 2, draws=8, tasks=3)
    result, took_part = run(Coba(warmup_steps=6, update_interval=interval), loss_TK, step_T=interval * np.arange(8))
    uniform = (result == 1 / 3).all(1).tolist()
    assert uniform == [interval * draw < 6 for draw in range(8)]
    assert took_part.all()


@every_small
def test_one_task_gets_everything(balancer):
    loss_TK, first_loss_K = curves("noisy", 2, draws=12, tasks=1)
    assert (run(balancer, loss_TK, first_loss_K)[0] == 1).all()
    assert (run(balancer, np.full((12, 1), 0.3))[0] == 1).all()


# Extreme losses: run() checks that every weight is finite, at least 0, and that they sum to 1


@every_small
def test_losses_of_zero(balancer):
    loss_TK, _ = curves("converging", 2, draws=12, tasks=3)
    loss_TK[:, 0] = 0.0
    loss_TK[5:, 1] = 0.0
    run(balancer, loss_TK)
    run(balancer, np.zeros((12, 3)))


def test_famo_gives_a_loss_of_zero_almost_everything():
    result, took_part = run(Famo(), [[0.0, 1.0, 2.0]] * 3)
    assert result[0].tolist() == pytest.approx([1.0, 1e-8, 5e-9], rel=1e-6)
    assert took_part.all()


def test_famo_below_the_lowest_loss_is_eps():
    below, _ = run(Famo(min_losses=(1.0, 1.0)), [[0.5, 2.0], [0.9, 2.0], [0.1, 2.0]])
    assert torch.equal(below, run(Famo(min_losses=(1.0, 1.0)), [[1.0, 2.0], [0.2, 2.0], [1.0, 2.0]])[0])


@every_small
@pytest.mark.parametrize("scales", [(1e100, 1e100), (1e-100, 1e-100), (1e100, 1e-100), (1e-300, 1.0), (1e-310, 1e-320)])
def test_enormous_and_tiny_losses(balancer, scales):
    loss_TK, _ = curves("noisy", 4, draws=12, tasks=4)
    run(balancer, loss_TK * np.array([scales[0], scales[1], 1.0, scales[0]]))
    run(balancer, loss_TK * scales[0])
    loss_TK[6:] *= scales[1]  # a jump in the middle of the window
    run(balancer, loss_TK)


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), tasks=st.integers(1, 5), draws=st.integers(1, 10))
def test_any_finite_losses_give_weights(name, data, tasks, draws):
    loss = st.one_of(st.floats(0, 20), st.floats(0, 1e30), st.sampled_from([0.0, 1.0, 1.0 + 2**-52]))
    values = data.draw(st.lists(loss, min_size=tasks * draws, max_size=tasks * draws))
    first_loss_K = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=tasks, max_size=tasks))
    run(SMALL[name], np.reshape(values, (draws, tasks)), first_loss_K)


# State


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [1, 17])
def test_resuming_from_a_saved_state_is_bit_exact(case, stop):
    name, options, interval = CASES[case]
    balancer = BALANCERS[name](update_interval=interval, **options)
    loss_TK, first_loss_K = curves("diverging", 6, draws=30, tasks=3)
    straight, straight_took_part = run(balancer, loss_TK, first_loss_K, interval * np.arange(30))
    state = balancer.begin(3, fp64(first_loss_K) if balancer.needs_first_losses else None)
    for draw in range(30):
        if draw == stop:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            balancer = BALANCERS[name](update_interval=interval, **options)
        state, weight_K, took_part_K = balancer.update(state, fp64(loss_TK[draw]), interval * draw)
        assert torch.equal(weight_K, straight[draw])
        assert torch.equal(took_part_K, straight_took_part[draw])


@every_small
def test_the_same_state_can_be_continued_twice(balancer):
    """run() sees that update leaves its input alone; two futures of one state must not share memory either."""
    loss_TK, first_loss_K = curves("noisy", 8, draws=14, tasks=3)
    state = balancer.begin(3, fp64(first_loss_K) if balancer.needs_first_losses else None)
    for step in range(7):
        state, _, _ = balancer.update(state, fp64(loss_TK[step]), step)
    futures = []
    for _ in range(2):
        future, weights = state, []
        for step in range(7, 14):
            future, weight_K, _ = balancer.update(future, fp64(loss_TK[step]), step)
            weights.append(weight_K)
        futures.append(torch.stack(weights))
    assert torch.equal(*futures)


def test_coba_refuses_to_begin_without_the_first_losses():
    with pytest.raises(ValueError, match="needs the losses before the first step"):
        Coba().begin(3)


def test_balancers_say_what_they_need():
    assert [name for name, kind in BALANCERS.items() if kind.needs_first_losses] == ["coba"]
    assert [name for name, kind in BALANCERS.items() if kind.fixed_draw] == ["famo"]
    assert {name: kind.task_options for name, kind in BALANCERS.items() if kind.task_options} == {
        "famo": ("min_losses",)
    }


def test_balancers_are_frozen_and_chosen_by_name():
    assert list(BALANCERS.items()) == [("self-paced", SelfPaced), ("famo", Famo), ("coba", Coba)]
    for kind in BALANCERS.values():
        balancer = kind()
        assert (balancer.update_interval, balancer.sample_valid_num) == (1, 1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            balancer.update_interval = 2


# Properties


@every_sloped
@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0])
def test_the_unit_of_the_losses_does_not_matter(balancer, factor):
    loss_TK, first_loss_K = curves("diverging", 9, draws=20, tasks=4)
    result = run(balancer, loss_TK, first_loss_K)[0]
    torch.testing.assert_close(run(balancer, factor * loss_TK, first_loss_K)[0], result, rtol=1e-9, atol=1e-18)
    if isinstance(balancer, Coba):
        scale_K = np.array([factor, 1.0, 3.0, 1 / factor])  # for ratios, not of a single task either
        scaled = run(balancer, scale_K * loss_TK, scale_K * first_loss_K)[0]
        torch.testing.assert_close(scaled, result, rtol=1e-9, atol=1e-18)


@every_small
def test_the_order_of_the_tasks_does_not_matter(balancer):
    loss_TK, first_loss_K = curves("noisy", 10, draws=20, tasks=6)
    loss_TK[:12, 2] = 1.0
    order = [3, 0, 5, 2, 1, 4]
    result, took_part = run(balancer, loss_TK, first_loss_K)
    other, other_took_part = run(balancer, loss_TK[:, order], first_loss_K[order])
    torch.testing.assert_close(other, result[:, order], rtol=1e-9, atol=1e-18)
    assert torch.equal(other_took_part, took_part[:, order])


def test_coba_gives_a_task_that_diverges_less_than_one_that_converges_slowly():
    k = np.arange(120)
    slow = 0.5 + 0.5 * np.exp(-k / 80)
    quick = 0.3 + 0.7 * np.exp(-k / 15)
    diverging = 0.4 + 0.6 * np.exp(-k / 15) + 0.01 * np.maximum(k - 50, 0)
    result, _ = run(Coba(warmup_steps=10, history_length=20), np.stack([slow, quick, diverging], axis=1))
    assert result[20, 0] > result[20, 1]  # while all converge, more to the slow one
    assert (result[75:, 2] < result[75:, 0]).all()
    assert result[-1, 2] < 0.1


def test_self_paced_gives_little_to_a_task_that_diverges():
    k = np.arange(40)
    loss_TK = np.stack([2 - 0.02 * k, 2 - 0.01 * k, 2 + 0.02 * k], axis=1)
    result, _ = run(SelfPaced(history_length=10), loss_TK)
    assert (result[9:, 2] < 1e-6).all()


def test_famo_raises_the_task_that_improves_least():
    """Against the share that 1/L alone would give, so that it is the logits that are seen."""
    k = np.arange(60)
    loss_TK = np.stack([2 * np.exp(-k / 20), 2 * np.exp(-k / 40), 2 * np.exp(-k / 400)], axis=1)
    result, _ = run(Famo(), loss_TK)
    logit_share = result * fp64(loss_TK)
    logit_share /= logit_share.sum(1, keepdim=True)
    assert (logit_share[1:].diff(dim=1) > 0).all()  # the less a task improves, the larger its logit
    assert logit_share[-1, 2] > 0.5
