"""Every loss, as options, and when two steps are the same."""

import numpy as np

from tests.parallel.run import whole

WEIGHTS = "completion=1 explain=2 write=0.5 read=3"
MODES = {
    "token": "--mft-loss token",
    "sample": "--mft-loss sample",
    "task-token": f"--mft-loss task-token --task-weights {WEIGHTS}",
    "task-sample": f"--mft-loss task-sample --task-weights {WEIGHTS}",
    "focal-sample": "--mft-loss focal-sample",
    "focal-sample detached": "--mft-loss focal-sample --focal-detach",
    "focal-task": "--mft-loss focal-task",
    "focal-task detached": "--mft-loss focal-task --focal-detach",
    "focal-task with alphas": f"--mft-loss focal-task --focal-alpha {WEIGHTS}",
}
# focal-task looks back at the last step that had a task, and read is missing from the second and the fourth
STEPS = {mode: 5 if "focal-task" in mode else 3 for mode in MODES}
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 3e-6  # of single elements, against the largest of the weight; seen: 2.1e-6, with eight layers


def assert_same_step(of_ranks, expected, where, tolerance=TOLERANCE):
    """A step as every rank reports it, and its gradients and weights put together, against that of one process."""
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
    """By the largest difference of each weight against the largest gradient of that weight."""
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 3 * 4 + 1  # of each of four layers, and of one end at least
    for name, gradient in theirs.items():
        largest = loosely * GRADIENT_TOLERANCE * np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=largest, err_msg=f"{where}: {name}")


def assert_same_weights(ours, theirs, where, loosely=1.0):
    """To a thousandth of a step (the learning rate is 1e-3): Adam magnifies the rounding of gradients near 0."""
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=loosely * 1e-6, err_msg=f"{where}: {name}'s weight")
