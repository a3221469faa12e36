"""Data sets whose samples and turns have weights: one process equals fp64, and parallel layouts equal one process."""

import functools

import pytest

from tests.made_dataset import write_dataset
from tests.parallel.layouts import BY_NAME
from tests.parallel.modes import MODES, TOLERANCE, assert_same_gradients, assert_same_step
from tests.parallel.run import arguments_for, open_dataset, train_in_modes
from tests.parallel.test_one_process import against_fp64
from tests.ranks import run_on_ranks

CHOSEN = {mode: MODES[mode] for mode in ("token", "task-sample", "task-token, epoch", "focal-sample", "focal-task")}
STEPS = dict.fromkeys(CHOSEN, 2)
LAYOUTS = ("DP2", "CP2")
SLOW = ("TP2 SP MB2", "PP2 VPP2 MB2", "CP2 PP2", "CP2 TP2 SP", "DP2 overlap")


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("weighted") / "set"
    write_dataset(prefix, 128, longest=120, split=(80, 20, 0), weighted="samples turns")
    return str(prefix)


def test_one_process_equals_the_reference_in_fp64(weighted):
    """Loss, gradient norm and gradients, at the trainer's weights before each step."""
    for mode, steps in run_on_ranks(1, against_fp64, weighted, CHOSEN, 2)[0].items():
        for (loss, norm, gradients), (book_loss, book_norm, book_gradients), _ in steps:
            assert loss == pytest.approx(book_loss, rel=TOLERANCE), mode
            assert norm == pytest.approx(book_norm, rel=TOLERANCE), mode
            assert_same_gradients(gradients, book_gradients, mode)


def vocabulary(tensor_parallel_size):
    """The vocabulary of 257 words is padded to 512 with every size."""
    return f"--make-vocab-size-divisible-by {256 // tensor_parallel_size}"


@functools.cache
def one_process(prefix):
    return run_on_ranks(1, train_in_modes, prefix, f"--micro-batch-size 4 {vocabulary(1)}", 1, CHOSEN, STEPS)[0]


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_layouts_equal_one_process(weighted, name):
    layout = BY_NAME[name]
    world = layout.world_size
    options = f"{layout.options} {vocabulary(2 if 'TP2' in name else 1)}"
    results = run_on_ranks(world, train_in_modes, weighted, options, world, CHOSEN, STEPS)
    for mode, curve in one_process(weighted).items():
        for step, record in enumerate(curve):
            assert_same_step([result[mode][step] for result in results], record, f"{mode}, step {step + 1}")


def _evaluated(prefix):
    """Task losses of an evaluation, and of a draw of the same samples, and what the plan says of them.

    Evaluations are normalised over all that is evaluated, whatever training is normalised over.
    """
    import numpy as np

    from mft_megatron.data.loading.step_plan import plan_evaluation
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, "--micro-batch-size 4 --mft-normalization epoch", 1)
    dataset = open_dataset(arguments)
    split = dataset.split("valid")
    plans = list(plan_evaluation(split, 4))
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        report = trainer.evaluate(split, plans, np.ones(4))
        draw_K = trainer.task_losses(dataset, [split.slices_of(pack) for pack in range(split.num_packs)])
    return report, draw_K, split.totals


def test_reported_losses_are_weighted_in_evaluations_and_draws(weighted):
    report, draw_K, totals = run_on_ranks(1, _evaluated, weighted)[0]
    assert report.tokens_K.tolist() == totals.tokens_K.tolist()
    assert report.token_weights_K.numpy() == pytest.approx(totals.token_weights_K, rel=1e-12)
    assert (report.loss_K / report.token_weights_K).numpy() == pytest.approx(draw_K, rel=1e-9)
    assert (report.loss_K / report.tokens_K).numpy() != pytest.approx(draw_K, rel=1e-2)
    assert report.loss == pytest.approx(draw_K.mean(), rel=1e-6)
