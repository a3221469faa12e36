"""Every loss as command-line options, and the comparison of two steps."""

import numpy as np

from tests.parallel.run import whole

WEIGHTS = "completion=1 explain=2 write=0.5 read=3"
MODES = {
    "token": "--mft-loss token",
    "sample": "--mft-loss sample",
    "task-token": f"--mft-loss task-token --task-weights {WEIGHTS}",
    "task-sample": f"--mft-loss task-sample --task-weights {WEIGHTS}",
    "task-token, epoch": f"--mft-loss task-token --task-weights {WEIGHTS} --mft-normalization epoch",
    "task-sample, epoch": f"--mft-loss task-sample --task-weights {WEIGHTS} --mft-normalization epoch",
    "focal-sample": "--mft-loss focal-sample",
    "focal-sample detached": "--mft-loss focal-sample --focal-detach",
    "focal-task": "--mft-loss focal-task",
    "focal-task detached": "--mft-loss focal-task --focal-detach",
    "focal-task with alphas": f"--mft-loss focal-task --focal-alpha {WEIGHTS}",
}
# focal-task uses statistics of the last step that had a task, and read is missing from the second and fourth steps
STEPS = {mode: 5 if "focal-task" in mode else 3 for mode in MODES}
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 3e-6  # of single elements, relative to the weight's largest; measured: 2.1e-6, with eight layers


def smallest_difference(values):
    """The smallest relative difference between any two values."""
    return min(abs(a / b - 1) for i, a in enumerate(values) for b in values[:i])


def assert_same_step(of_ranks, expected, where, tolerance=TOLERANCE):
    """Compare every rank's report of a step, and its gathered gradients and weights, with those of one process."""
    for record in of_ranks:
        for name in ("loss", "grad_norm", "loss_K", "objective_K", "share_K"):
            np.testing.assert_allclose(record[name], expected[name], rtol=tolerance, err_msg=f"{where}: {name}")
        np.testing.assert_array_equal(record["tokens_K"], expected["tokens_K"], f"{where}: supervised tokens")
    loosely = tolerance / TOLERANCE
    if "gradients" in expected and any(record["gradients"] for record in of_ranks):
        assert_same_gradients(*_whole(of_ranks, expected, "gradients"), where, loosely)
    if "weights" in expected:
        assert_same_weights(*_whole(of_ranks, expected, "weights"), where, loosely)


def _whole(of_ranks, expected, what):
    return whole([record[what] for record in of_ranks]), whole([expected[what]])


def assert_same_gradients(ours, theirs, where, loosely=1.0):
    """Compare the largest difference of each weight's gradient with that weight's largest gradient."""
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 3 * 4 + 1  # three of each of four layers, and at least one of embedding and output layer
    for name, gradient in theirs.items():
        largest = loosely * GRADIENT_TOLERANCE * np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=largest, err_msg=f"{where}: {name}")


def assert_same_weights(ours, theirs, where, loosely=1.0):
    """Compare up to 1/1000 of a step (the learning rate is 1e-3), since Adam amplifies rounding of small gradients."""
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=loosely * 1e-6, err_msg=f"{where}: {name}'s weight")
