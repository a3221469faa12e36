"""Plain mixture against multi-task balancing, on unequal code tasks and a tiny model: what ``make mft-vs-mixed`` runs.

::

    standard library ─► five tasks, a sixth, and plain functions ─► tokenizer ─► packed data sets
    plain functions  ─► one base model per seed
    the tasks        ─► one run per method and seed, from the seed's base ─┐
    each task alone  ─► one run per task and seed, from the seed's base ───┼─► results.json, table.md, plot.png
    training samples and the sixth task ─► one evaluation per final model ─┘

Every run is a process of ``pretrain_mft.py``. Complete runs are not repeated, so an interrupted example continues.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import methods
import samples
from measurements import read_probe, read_run, read_single
from methods import BASE_MODEL, METHODS, ONE_MODEL_A_TASK
from report import as_json, table
from results import Comparison
from trainings import Training, run_all

from mft_megatron.errors import InputError, run_command
from mft_megatron.run_folder.replace_text import replace_text

ROOT = Path(__file__).resolve().parent.parent.parent
CONTENTS = {"samples", "tokenizer", "data", "base", "runs", "logs", "results.json", "table.md", "plot.png"}
VOCABULARY = 2048
TASKS, FUNCTIONS, PROBE = "tasks", "functions", "probe"
SPLIT = ",".join(f"{weight:g}" for weight in samples.SPLIT)
# Each data set: its tasks, their folder, its split. The probe trains on nothing, but a data set needs a training sample
# of each task.
DATA = {
    TASKS: (samples.TASK_NAMES, "", SPLIT),
    FUNCTIONS: ((samples.FUNCTIONS,), "", "100,0,0"),
    PROBE: ((*samples.TASK_NAMES, samples.UNSEEN), "probe", "0.001,99.999,0"),
    **{task: ((task,), "", SPLIT) for task in samples.TASK_NAMES},
}


@dataclass(frozen=True)
class Plan:
    """All runs of ``pretrain_mft.py``, by what is compared and seed; ``singles`` also by task."""

    bases: dict[int, Training]
    runs: dict[tuple[str, int], Training]
    singles: dict[tuple[int, str], Training]
    probes: dict[tuple[str, int], Training]

    def stages(self) -> list[list[Training]]:
        """Runs that may run at the same time, stage after stage."""
        return [list(self.bases.values()), [*self.runs.values(), *self.singles.values()], list(self.probes.values())]


def prepare(folder: Path) -> dict[str, Path]:
    """Samples, tokenizer and the data sets, each made once; returns the data sets' prefixes by name."""
    tasks, tokenizer = folder / "samples", folder / "tokenizer"
    prefixes = {name: folder / "data" / name for name in DATA}
    if all(_ledger(prefix).exists() for prefix in prefixes.values()):
        return prefixes
    for path in (tasks, tokenizer, folder / "data"):
        shutil.rmtree(path, ignore_errors=True)
    _say(f"samples: {', '.join(f'{name} {count:,}' for name, count in samples.write_samples(tasks).items())}")
    words = ("--tasks-dir", tasks, "--output-dir", tokenizer, "--vocab-size", VOCABULARY)
    _step(folder, "examples/demo/train_tokenizer.py", *words)
    for name, (names, where, split) in DATA.items():
        _step(
            folder,
            "tools/preprocess_data.py",
            *(word for task in names for word in ("--task", f"{task}={tasks / where / task}.jsonl")),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--chat-template", "chatml"),
            *("--seq-length", methods.SEQ_LENGTH, "--overlong", "truncate", "--split", split),
            *("--output-prefix", prefixes[name]),
        )
    return prefixes


def plan(folder: Path, prefixes: dict[str, Path], seeds: list[int], iterations: int, base_iterations: int) -> Plan:
    """Plan all runs; without ``base_iterations`` all start from random weights."""
    data = {name: sha256(_ledger(prefix).read_bytes()).hexdigest() for name, prefix in prefixes.items()}
    bases: dict[int, Training] = {}
    for seed in seeds if base_iterations else ():
        path = folder / "base" / f"seed{seed}"
        words = methods.base_words(prefixes[FUNCTIONS], path / "save", seed, base_iterations)
        bases[seed] = _training(f"base, seed {seed}", words, path, data[FUNCTIONS])
    runs, singles, probes = {}, {}, {}

    def method_run(name: str, method: methods.Method, dataset: str, seed: int) -> Training:
        base = bases.get(seed) if method.from_base else None
        path = folder / "runs" / f"{name.replace(' ', '-')}-seed{seed}"
        save = base and base.save
        words = methods.method_words(method, prefixes[dataset], path / "save", seed, iterations, save)
        return _training(f"{name}, seed {seed}", words, path, f"{data[dataset]} {base.receipt if base else 'no base'}")

    def probe(name: str, model: Training, seed: int) -> Training:
        path = model.folder / "probe"
        words = methods.probe_words(prefixes[PROBE], model.save, path / "save")
        return _training(f"probe of {name}, seed {seed}", words, path, f"{data[PROBE]} {model.receipt}")

    for seed in seeds:
        for name, method in METHODS.items():
            runs[name, seed] = method_run(name, method, TASKS, seed)
            probes[name, seed] = probe(name, runs[name, seed], seed)
        for task in samples.TASK_NAMES:
            singles[seed, task] = method_run(f"only {task}", methods.SINGLE, task, seed)
        if seed in bases:
            probes[BASE_MODEL, seed] = probe(BASE_MODEL, bases[seed], seed)
    return Plan(bases, runs, singles, probes)


def compare(plan: Plan, seeds: list[int]) -> Comparison:
    """Read what all runs have measured."""
    questions = samples.UNSEEN, samples.RAREST
    runs = {
        name: [read_run(plan.runs[name, seed].metrics, plan.probes[name, seed].metrics, *questions) for seed in seeds]
        for name in METHODS
    }
    singles = [read_single({task: plan.singles[seed, task].metrics for task in samples.TASK_NAMES}) for seed in seeds]
    models = {ONE_MODEL_A_TASK: singles}
    if plan.bases:
        models[BASE_MODEL] = [read_probe(plan.probes[BASE_MODEL, seed].metrics, *questions) for seed in seeds]
    return Comparison(runs, models)


def report(folder: Path, comparison: Comparison, seeds: list[int], iterations: int, settings: dict) -> None:
    """Write results.json, table.md and plot.png."""
    from figures import plot  # matplotlib takes a second, and a refusal should not wait for it

    text = table(comparison, seeds, iterations)
    replace_text(folder / "results.json", json.dumps(as_json(comparison, seeds, settings), indent=2) + "\n")
    replace_text(folder / "table.md", text)
    plot(comparison, folder / "plot.png")
    print(f"\n{text}")


def _training(name: str, words: list[str], folder: Path, inputs: str) -> Training:
    return Training(name, (sys.executable, str(ROOT / "pretrain_mft.py"), *words), folder, inputs)


def _ledger(prefix: Path) -> Path:
    return Path(f"{prefix}_dataset.json")


def _step(folder: Path, script: str, *words: object) -> None:
    name = Path(script).stem
    training = Training(name, (sys.executable, str(ROOT / script), *map(str, words)), folder / "logs" / name, "")
    training.run(ROOT)
    for line in training.log.read_text().splitlines()[1:]:
        _say(line)


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> None:
    """Parse the options, train every run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "mft_vs_mixed_run", help="folder for all results")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="SEED", help="default: 1 2 3 4 5"
    )
    parser.add_argument("--iterations", type=int, default=100, help="optimizer steps of a run (default: 100)")
    parser.add_argument(
        "--base-iterations", type=int, default=200, help="of a base model; 0: start from random weights (default: 200)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    _check(options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    prefixes = prepare(folder)
    planned = plan(folder, prefixes, options.seeds, options.iterations, options.base_iterations)
    for stage in planned.stages():
        run_all(stage, options.jobs, ROOT, _say)
    settings = {
        "seeds": options.seeds,
        "iterations": options.iterations,
        "base_iterations": options.base_iterations,
        "seconds_of_the_last_call": round(time.perf_counter() - start),
        "cpu_seconds": round(sum(training.cpu_seconds() for stage in planned.stages() for training in stage)),
    }
    report(folder, compare(planned, options.seeds), options.seeds, options.iterations, settings)
    seconds, cpu_seconds = settings["seconds_of_the_last_call"], settings["cpu_seconds"]
    _say(
        f"done in {seconds} s; all runs took {cpu_seconds} s of processor time; results.json, table.md and plot.png in "
        f"{folder}"
    )


def _check(options: argparse.Namespace, folder: Path) -> None:
    for name, least in (("iterations", methods.SHORTEST), ("base_iterations", 0), ("jobs", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least}")
    if 0 < options.base_iterations < methods.SHORTEST:
        raise InputError(f"--base-iterations {options.base_iterations}: 0, or at least {methods.SHORTEST}")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise InputError(f"--seeds {' '.join(map(str, options.seeds))}: different numbers from 0 on")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--folder {folder}: is a file; name a folder")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in CONTENTS) if folder.is_dir() else []
    if foreign:
        raise InputError(f"--folder {folder}: has {foreign[0]}, which is not of this example; name another folder")


if __name__ == "__main__":
    sys.exit(run_command(main))
