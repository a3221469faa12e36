"""The compared methods: one model, one schedule, and the options that each method changes.

::

    base      plain functions of the library, every token counts the same     ─► one model per seed
    methods   the five tasks from that model, with the options of METHODS      ─► one run per method and seed

Everything here is part of ``pretrain_mft.py``'s command line.
"""

from dataclasses import dataclass
from pathlib import Path

SEQ_LENGTH = 192
WARMUP = 10  # steps
MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --ffn-hidden-size 192 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear"
)
COMMON = (
    f"--seq-length {SEQ_LENGTH} --global-batch-size 24 --attention-dropout 0 --hidden-dropout 0 --adam-beta2 0.95 "
    f"--lr-decay-style cosine --lr-warmup-iters {WARMUP} --log-interval 1 --no-save-optim"
)
BASE = "--mft-loss token --micro-batch-size 8 --lr 1e-2 --min-lr 1e-3 --eval-iters 0"
TASKS = "--lr 3e-3 --min-lr 3e-4"
SHORTEST = WARMUP + 2  # the learning rate needs a step to decay in
EVALUATIONS = 5  # in a run, evenly spaced; the last one after the last step

# Every draw holds the same few hundred tokens of each task, and there is one after every step.
DRAWS = "--{0}-update-interval 1 --{0}-sample-valid-num 8"


@dataclass(frozen=True)
class Method:
    """One way to weight tasks. ``options``: for the command line. ``row``: its row of the plot."""

    options: str
    row: str
    micro_batch_size: int = 8  # under global normalisation it changes nothing but the speed


METHODS = {
    "token": Method("--mft-loss token", "weights"),
    "micro-batch": Method("--mft-loss task-token --mft-normalization micro-batch", "weights", micro_batch_size=1),
    "task-token": Method("--mft-loss task-token", "weights"),
    "task-sample": Method("--mft-loss task-sample", "focal"),
    "focal-sample": Method("--mft-loss focal-sample", "focal"),
    "focal-task": Method("--mft-loss focal-task", "focal"),
    "focal-detached": Method("--mft-loss focal-sample --focal-detach", "focal"),
    "self-paced": Method(
        "--mft-loss task-token --task-balance self-paced --self-paced-history-length 20 " + DRAWS.format("self-paced"),
        "balancers",
    ),
    "famo": Method("--mft-loss task-token --task-balance famo " + DRAWS.format("famo"), "balancers"),
    "coba": Method(
        "--mft-loss task-token --task-balance coba --coba-warmup-steps 20 --coba-history-length 40 "
        + DRAWS.format("coba"),
        "balancers",
    ),
}
BALANCERS = tuple(method for method, chosen in METHODS.items() if chosen.row == "balancers")
BALANCED = "task-token"
# What a method is compared with, seed by seed. Without their factor the focal losses are task-sample.
COMPARED = {
    "token": tuple(method for method in METHODS if method != "token"),
    "task-token": tuple(method for method in METHODS if method != "task-token"),
    "task-sample": ("focal-sample", "focal-task", "focal-detached"),
}


def base_words(data: Path, save: Path, seed: int, iterations: int) -> list[str]:
    """The words after ``pretrain_mft.py`` for the model that a seed's runs start from."""
    return _words(f"{MODEL} {COMMON} {BASE}", data, save, seed, iterations)


def method_words(method: str, data: Path, save: Path, seed: int, iterations: int, base: Path | None) -> list[str]:
    """The words after ``pretrain_mft.py`` for one run; without a ``base`` it starts from random weights."""
    chosen = METHODS[method]
    words = _words(f"{MODEL} {COMMON} {TASKS} {chosen.options}", data, save, seed, iterations)
    words += ["--micro-batch-size", str(chosen.micro_batch_size)]
    words += ["--eval-interval", str(max(1, iterations // EVALUATIONS))]
    return words if base is None else [*words, "--load", str(base), "--finetune"]


def _words(options: str, data: Path, save: Path, seed: int, iterations: int) -> list[str]:
    run = ["--data-path", str(data), "--save", str(save), "--seed", str(seed), "--train-iters", str(iterations)]
    return [*options.split(), *run]
