"""Jobs that the harness kills: each is a small version of what a user runs, started again by the same command.

A word ``{data}``, ``{model}``, ``{tokenizer}``, ``{tasks}`` or ``{run}`` of a command stands for what :class:`Material`
has, and ``{out}`` for the folder that the job writes.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from tests.faults.jobs import Command, Server, run
from tests.made_tokenizer import write_tokenizer
from tests.task_records import task_records

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights "
)
# dropout is on, as it is by default
RUN = (
    "--data-path {data} --save {out}/run --auto-resume --lr 1e-3 --log-interval 1 --micro-batch-size 1 "
    "--global-batch-size 4 --mft-loss task-token --task-weights completion=2 --save-interval 2 --eval-interval 3 "
)
LENGTH = "--train-iters 14 "
# functions that data sets are made of
FUNCTIONS = {"small": 60, "large": 3000}
TRAINING = ("start", "training", "evaluation", "saving", "background saving", "end")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A job and how it is killed.

    Attributes:
        words: its command line.
        script: path in the repository.
        ranks: as in :class:`Command`.
        forked: as in :class:`Command`.
        restarts: as in :class:`Command`.
        phases: in which it is killed.
        targets: what is killed: "all" processes, one "rank", the "launcher" alone, or a "helper" of a rank; a worker of
            a command is a rank.
        done: words of the refusal to make again what a job had completed before it was killed.
        copied: what ``{out}`` has at the beginning: the name of a folder of :class:`Material`.
        weight: how often it is taken, beside the others.
    """

    words: str
    script: str = "pretrain_mft.py"
    ranks: int | None = None
    forked: bool = True
    restarts: int = 0
    phases: tuple[str, ...] = TRAINING
    targets: tuple[str, ...] = ("all", "rank", "launcher")
    done: str | None = None
    copied: str | None = None
    weight: int = 1

    @property
    def trains(self) -> bool:
        """Whether it has a run folder with steps."""
        return self.script == "pretrain_mft.py"

    @property
    def background(self) -> bool:
        """Whether it saves in the background."""
        return "--async-save" in self.words


SCENARIOS = {
    "one rank": Scenario(MODEL + RUN + LENGTH, targets=("all",)),
    "TP2 PP2": Scenario(
        MODEL + RUN.replace("--auto-resume", "--load {out}/run") + LENGTH
        + "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
        ranks=4,
    ),
    "async": Scenario(
        MODEL + RUN + LENGTH + "--async-save --use-distributed-optimizer --bf16", ranks=2, weight=3,
        targets=("all", "rank", "launcher", "helper"),
    ),
    "epochs, ramp-up": Scenario(
        MODEL + RUN.replace("--global-batch-size 4", "--global-batch-size 12")
        + "--num-train-epochs 2.5 --rampup-batch-size 4 4 24 --lr-decay-style cosine",
        targets=("all",),
    ),
    "coba": Scenario(
        MODEL + RUN.replace("--task-weights completion=2 ", "") + LENGTH
        + "--task-balance coba --coba-warmup-steps 2 --coba-history-length 4 --save-best --async-save",
        targets=("all",),
    ),
    "famo": Scenario(
        MODEL + RUN.replace("--task-weights completion=2 ", "") + LENGTH + "--task-balance famo",
        ranks=2,
    ),
    "bad steps": Scenario(
        MODEL + RUN + LENGTH + "--on-bad-step skip --loss-spike-factor 0.2 --loss-spike-window 16 --max-bad-steps 99 "
        "--keep-last 2 --save-retain-interval 6",
        targets=("all",),
    ),
    "rollback": Scenario(
        MODEL + RUN + LENGTH + "--on-bad-step rollback --loss-spike-factor 0.2 --loss-spike-window 16 --async-save",
        targets=("all",),
    ),
    "LoRA": Scenario(
        RUN + LENGTH + "--hf-checkpoint {model} --peft-type lora --lora-rank 4 --lora-dropout 0.1 --save-adapters-only "
        "--bf16",
        ranks=2,
    ),
    "export": Scenario(
        MODEL + RUN + LENGTH + "--save-hf {out}/hf --save-hf-interval 4",
        phases=("saving", "export", "end", "training"),
        targets=("all", "helper"),
    ),
    "torchrun": Scenario(MODEL + RUN + LENGTH + "--async-save", ranks=2, forked=False, weight=2),
    "torchrun --max-restarts": Scenario(
        MODEL + RUN + LENGTH, ranks=2, forked=False, restarts=3, targets=("rank",)
    ),
    "preprocessing": Scenario(
        "{tasks} --tokenizer-model {tokenizer} --chat-template chatml --seq-length 128 --split 80,20,0 --workers 2 "
        "--output-prefix {out}/set",
        script="tools/preprocess_data.py",
        forked=False,
        phases=("preprocessing",),
        targets=("all", "rank", "launcher"),
        weight=2,
    ),
    "packing": Scenario(
        "--data-path {out}/set --seq-length 256",
        script="tools/pack_data.py",
        forked=False,
        phases=("packing",),
        targets=("all",),
        copied="large",
    ),
    "conversion": Scenario(
        "mcore-to-hf --load {run} --hf {out}/hf",
        script="tools/convert_checkpoint.py",
        phases=("conversion",),
        targets=("all",),
        done="exists already",
    ),
}  # fmt: skip


class Material:
    """Input of jobs: a tokenizer, tasks, data sets, a model and a run; each is made when it is first needed."""

    def __init__(self, folder: Path, server: Server):
        """
        Args:
            folder: that all is written into.
            server: runs the commands that make it.
        """
        self._folder, self._server = folder, server

    def words(self, scenario: Scenario, out: Path) -> tuple[str, ...]:
        """The command line of a scenario that writes into ``out``."""
        found = []
        for word in scenario.words.split():
            if word == "{tasks}":
                found += self._task_words("large")
                continue
            for name, make in (
                ("{data}", lambda: self.data("small") / "set"),
                ("{tokenizer}", self.tokenizer),
                ("{model}", self.model),
                ("{run}", self.run),
                ("{out}", lambda: out),
            ):
                if name in word:
                    word = word.replace(name, str(make()))
            found.append(word)
        return tuple(found)

    def command(self, scenario: Scenario, out: Path) -> Command:
        """The command of a scenario that writes into ``out``, which gets what is to be copied there."""
        if scenario.copied is not None and not out.exists():
            shutil.copytree(self.data(scenario.copied), out)
        out.mkdir(parents=True, exist_ok=True)
        return Command(scenario.script, self.words(scenario, out), scenario.ranks, scenario.forked, scenario.restarts)

    def tokenizer(self) -> Path:
        """A tokenizer folder."""
        return self._made("tokenizer", write_tokenizer)

    def data(self, size: str) -> Path:
        """The folder of a data set named ``set``."""

        def write(folder: Path) -> None:
            words = SCENARIOS["preprocessing"].words.replace("{out}", str(folder)).replace("--workers 2", "")
            words = words.replace("{tokenizer}", str(self.tokenizer())).replace("{tasks}", "")
            command = Command("tools/preprocess_data.py", (*self._task_words(size), *words.split()))
            run(self._server, command, self._folder / f"data_{size}.log")

        return self._made(f"data_{size}", write)

    def model(self) -> Path:
        """A Hugging Face model that fits the tokenizer."""

        def write(folder: Path) -> None:
            from tests.convert import tiny_models

            sizes = {"vocab_size": 500, "max_position_embeddings": 256}
            tiny_models.write_model("llama", folder, "bfloat16", self.tokenizer(), **sizes)

        return self._made("model", write)

    def run(self) -> Path:
        """The folder of a run."""

        def write(folder: Path) -> None:
            words = (MODEL + RUN + LENGTH).replace("{data}", str(self.data("small") / "set"))
            words = words.replace("{out}/run", str(folder))
            run(self._server, Command("pretrain_mft.py", tuple(words.split())), self._folder / "run.log")

        return self._made("run", write)

    def _task_words(self, size: str) -> list[str]:
        def write(folder: Path) -> None:
            for name, records in task_records(FUNCTIONS[size]).items():
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

        folder = self._made(f"tasks_{size}", write)
        return [word for path in sorted(folder.iterdir()) for word in ("--task", f"{path.stem}={path}")]

    def _made(self, name: str, write) -> Path:
        folder = self._folder / name
        if not folder.exists():
            folder.mkdir()
            write(folder)
        return folder
