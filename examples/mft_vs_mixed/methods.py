"""The compared methods: one model, one schedule, and the options that each method changes.

::

    base      plain functions of the library, every token counts the same     ─► one model per seed
    methods   the five tasks from that model, with the options of METHODS      ─► one run per method and seed
    single    each task alone from that model, the same steps                  ─► five runs per seed, one "method"
    probe     every final model on the training samples and on an unseen task  ─► one evaluation per run

Everything here is part of ``pretrain_mft.py``'s command line.
"""

from dataclasses import dataclass
from pathlib import Path

SEQ_LENGTH = 192
WARMUP = 10  # steps
ROWS = 24  # of a step; a method with fewer takes more steps, so that it reads as many rows
MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --ffn-hidden-size 192 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear"
)
COMMON = (
    f"--seq-length {SEQ_LENGTH} --attention-dropout 0 --hidden-dropout 0 --adam-beta2 0.95 "
    f"--lr-decay-style cosine --lr-warmup-iters {WARMUP} --log-interval 1 --no-save-optim"
)
BASE = f"--mft-loss token --global-batch-size {ROWS} --micro-batch-size {ROWS} --lr 1e-2 --min-lr 1e-3 --eval-iters 0"
SHORTEST = WARMUP + 2  # the learning rate needs a step to decay in
EVALUATIONS = 4  # in a run, evenly spaced; the last one after the last step

# Every draw holds the same few hundred tokens of each task, and there is one after every step.
DRAWS = "--{0}-update-interval 1 --{0}-sample-valid-num 8"
GLOBAL, EPOCH = "--mft-normalization global", "--mft-normalization epoch"


@dataclass(frozen=True)
class Method:
    """One way to weight tasks.

    Attributes:
        options: for the command line.
        group: methods of a group stand together in tables and in the plot.
        rows: of a step.
        micro_batch_size: rows; by default all of a step. It matters to one of the normalisations alone.
        from_base: start from the seed's base, not from random weights.
    """

    options: str
    group: str
    rows: int = ROWS
    micro_batch_size: int | None = None
    from_base: bool = True

    def steps(self, iterations: int) -> int:
        """Steps that read as many rows as ``iterations`` of ``ROWS``."""
        return iterations * ROWS // self.rows


METHODS = {
    "mixture": Method(f"--mft-loss token {GLOBAL}", "weights"),
    "micro-batch": Method("--mft-loss task-token --mft-normalization micro-batch", "weights", micro_batch_size=1),
    "global": Method(f"--mft-loss task-token {GLOBAL}", "weights"),
    "epoch": Method(f"--mft-loss task-token {EPOCH}", "weights"),
    "sample global": Method(f"--mft-loss task-sample {GLOBAL}", "samples"),
    "sample epoch": Method(f"--mft-loss task-sample {EPOCH}", "samples"),
    "focal-sample": Method(f"--mft-loss focal-sample {GLOBAL}", "samples"),
    "focal-detached": Method(f"--mft-loss focal-sample --focal-detach {GLOBAL}", "samples"),
    "self-paced": Method(
        f"--mft-loss task-token {GLOBAL} --task-balance self-paced --self-paced-history-length 20 "
        + DRAWS.format("self-paced"),
        "balancers",
    ),
    "famo": Method(f"--mft-loss task-token {GLOBAL} --task-balance famo " + DRAWS.format("famo"), "balancers"),
    "coba": Method(
        f"--mft-loss task-token {GLOBAL} --task-balance coba --coba-warmup-steps 20 --coba-history-length 40 "
        + DRAWS.format("coba"),
        "balancers",
    ),
    "small global": Method(f"--mft-loss task-token {GLOBAL}", "small steps", rows=6),
    "small epoch": Method(f"--mft-loss task-token {EPOCH}", "small steps", rows=6),
    "scratch global": Method(f"--mft-loss task-token {GLOBAL}", "from scratch", from_base=False),
    "scratch epoch": Method(f"--mft-loss task-token {EPOCH}", "from scratch", from_base=False),
    "small scratch global": Method(f"--mft-loss task-token {GLOBAL}", "from scratch", rows=6, from_base=False),
    "small scratch epoch": Method(f"--mft-loss task-token {EPOCH}", "from scratch", rows=6, from_base=False),
}
SINGLE = Method(f"--mft-loss token {GLOBAL}", "weights")  # one model a task
ONE_MODEL_A_TASK = "one model a task"
BASE_MODEL = "base"
BALANCERS = tuple(method for method, chosen in METHODS.items() if chosen.group == "balancers")
BALANCED = "global"
# The question of each table: what a method is compared with, seed by seed.
COMPARED = {
    "mixture": ("micro-batch", "global", "epoch", ONE_MODEL_A_TASK),
    "global": ("sample global", *BALANCERS),
    "sample global": ("focal-sample", "focal-detached"),
    ONE_MODEL_A_TASK: ("global", "epoch"),
}
# epoch against global, in each setting.
EPOCH_AGAINST = {
    "epoch": "global",
    "small epoch": "small global",
    "scratch epoch": "scratch global",
    "small scratch epoch": "small scratch global",
    "sample epoch": "sample global",
}


def base_words(data: Path, save: Path, seed: int, iterations: int) -> list[str]:
    """The words after ``pretrain_mft.py`` for the model that a seed's runs start from."""
    return _words(f"{MODEL} {COMMON} {BASE}", data, save, seed, iterations)


def method_words(method: Method, data: Path, save: Path, seed: int, iterations: int, base: Path | None) -> list[str]:
    """The words after ``pretrain_mft.py`` for one run; without a ``base`` it starts from random weights."""
    steps = method.steps(iterations)
    words = _words(f"{MODEL} {COMMON} {_schedule(method)} {method.options}", data, save, seed, steps)
    words += ["--eval-interval", str(max(1, steps // EVALUATIONS))]
    return words if base is None else [*words, "--load", str(base), "--finetune"]


def probe_words(data: Path, model: Path, save: Path) -> list[str]:
    """The words after ``pretrain_mft.py`` that evaluate the last checkpoint of ``model`` on the probe's data."""
    words = _words(f"{MODEL} {COMMON} {BASE}", data, save, 1, SHORTEST)
    index = words.index("--eval-iters")
    return [*words[:index], *words[index + 2 :], "--load", str(model), "--finetune", "--skip-train"]


def _schedule(method: Method) -> str:
    """Batch sizes and learning rates; the rate goes with the root of the rows of a step."""
    scale = (method.rows / ROWS) ** 0.5
    micro_batch_size = method.rows if method.micro_batch_size is None else method.micro_batch_size
    return (
        f"--global-batch-size {method.rows} --micro-batch-size {micro_batch_size} "
        f"--lr {3e-3 * scale:g} --min-lr {3e-4 * scale:g}"
    )


def _words(options: str, data: Path, save: Path, seed: int, iterations: int) -> list[str]:
    run = ["--data-path", str(data), "--save", str(save), "--seed", str(seed), "--train-iters", str(iterations)]
    return [*options.split(), *run]
