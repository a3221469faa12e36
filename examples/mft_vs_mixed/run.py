"""Plain mixture against multi-task balancing, on unequal code tasks and a tiny model: what ``make mft-vs-mixed`` runs.

::

    standard library ─► five tasks, and plain functions ─► tokenizer ─► two packed data sets
    plain functions  ─► one base model per seed
    the tasks        ─► one run per method and seed, from the seed's base ─► results.json, table.md, plot.png

Every run is a process of ``pretrain_mft.py``. Complete runs are not repeated, so an interrupted example continues.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from hashlib import sha256
from pathlib import Path

import methods
import samples
from report import as_json, table
from results import Comparison, read_run
from trainings import Training, run_all

from mft_megatron.errors import InputError, run_command
from mft_megatron.run_folder import replace_text

ROOT = Path(__file__).resolve().parent.parent.parent
CONTENTS = {"samples", "tokenizer", "data", "base", "runs", "logs", "results.json", "table.md", "plot.png"}
VOCABULARY = 2048
SPLITS = {"tasks": "80,20,0", "functions": "100,0,0"}


def prepare(folder: Path) -> dict[str, Path]:
    """Samples, tokenizer and the two data sets, each made once; returns the data sets' prefixes by name."""
    tasks, tokenizer = folder / "samples", folder / "tokenizer"
    prefixes = {name: folder / "data" / name for name in SPLITS}
    ledgers = [Path(f"{prefix}_dataset.json") for prefix in prefixes.values()]
    if all(ledger.exists() for ledger in ledgers):
        return prefixes
    for path in (tasks, tokenizer, folder / "data"):
        shutil.rmtree(path, ignore_errors=True)
    _say(f"samples: {', '.join(f'{name} {count:,}' for name, count in samples.write_samples(tasks).items())}")
    _step(
        folder,
        "examples/demo/train_tokenizer.py",
        "--tasks-dir",
        tasks,
        "--output-dir",
        tokenizer,
        "--vocab-size",
        VOCABULARY,
    )
    inputs = {"tasks": samples.TASK_NAMES, "functions": (samples.FUNCTIONS,)}
    for name, prefix in prefixes.items():
        _step(
            folder,
            "tools/preprocess_data.py",
            *(word for task in inputs[name] for word in ("--task", f"{task}={tasks / task}.jsonl")),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--chat-template", "chatml"),
            *("--seq-length", methods.SEQ_LENGTH, "--split", SPLITS[name], "--output-prefix", prefix),
        )
    return prefixes


def plan(
    folder: Path, prefixes: dict[str, Path], seeds: list[int], iterations: int, base_iterations: int
) -> tuple[list[Training], dict[tuple[str, int], Training]]:
    """The base models' runs, and the methods' by method and seed; grouped by seed."""
    start = (sys.executable, str(ROOT / "pretrain_mft.py"))
    data = {name: sha256(Path(f"{prefix}_dataset.json").read_bytes()).hexdigest() for name, prefix in prefixes.items()}
    bases: dict[int, Training] = {}
    for seed in seeds if base_iterations else ():
        path = folder / "base" / f"seed{seed}"
        words = methods.base_words(prefixes["functions"], path / "save", seed, base_iterations)
        bases[seed] = Training(f"base, seed {seed}", (*start, *words), path, data["functions"])
    runs = {}
    for seed in seeds:
        base = bases.get(seed)
        for method in methods.METHODS:
            path = folder / "runs" / f"{method}-seed{seed}"
            words = methods.method_words(method, prefixes["tasks"], path / "save", seed, iterations, base and base.save)
            inputs = f"{data['tasks']} {base.receipt if base else 'no base'}"
            runs[method, seed] = Training(f"{method}, seed {seed}", (*start, *words), path, inputs)
    return list(bases.values()), runs


def report(
    folder: Path, runs: dict[tuple[str, int], Training], seeds: list[int], iterations: int, settings: dict
) -> None:
    """Read all runs and write results.json, table.md and plot.png."""
    from figures import plot  # matplotlib takes a second, and a refusal should not wait for it

    comparison = Comparison(
        {method: [read_run(runs[method, seed].metrics) for seed in seeds] for method in methods.METHODS}
    )
    text = table(comparison, seeds, iterations)
    replace_text(folder / "results.json", json.dumps(as_json(comparison, seeds, settings), indent=2) + "\n")
    replace_text(folder / "table.md", text)
    plot(comparison, folder / "plot.png")
    print(f"\n{text}")


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="default: 1 2 3")
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
    bases, runs = plan(folder, prefixes, options.seeds, options.iterations, options.base_iterations)
    run_all(bases, options.jobs, ROOT, _say)
    run_all(list(runs.values()), options.jobs, ROOT, _say)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = {
        "seeds": options.seeds,
        "iterations": options.iterations,
        "base_iterations": options.base_iterations,
        "seconds_of_the_last_call": round(time.perf_counter() - start),
        "cpu_seconds_of_the_last_call": round(used.ru_utime + used.ru_stime),
    }
    report(folder, runs, options.seeds, options.iterations, settings)
    seconds, cpu_seconds = settings["seconds_of_the_last_call"], settings["cpu_seconds_of_the_last_call"]
    _say(
        f"done in {seconds} s, with {cpu_seconds} s of processor time; results.json, table.md and plot.png in {folder}"
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
