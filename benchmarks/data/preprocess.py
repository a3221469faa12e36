"""Cost of tokenising a corpus: the preprocessing command against other tools and against bare libraries.

::

    standard library ─► samples ─┬─► tools/preprocess_data.py    masks, splits, packs, ledger; backends auto and hf
                                 ├─► MFTCoder, Megatron-LM       their offline tools, from checkouts
                                 └─► bare libraries              ids alone, nothing kept

Each runs in a separate process, in turn, several times. CPU seconds count the process and its children from start to
end; start-up is the same with ten samples. Tools that are not installed are left out, and the table says why.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from corpus import byte_level_tokenizer, sentencepiece_model, write_samples

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import processor, write_numbers

ROOT = Path(__file__).parents[2]
OURS = "preprocess_data.py, auto"
# Megatron-LM's main branch is written for Python 3.12
SHIM = """\
import typing
try:
    import typing_extensions
    typing.override = getattr(typing, "override", typing_extensions.override)
except ImportError:
    pass
"""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A tool that is measured.

    ``command``: its command line, from a folder of samples and a folder for results. ``tokens``: counts the tokens,
    from the results or the last line printed. ``missing``: why it cannot run.
    """

    command: Callable[[Path, Path], list[str]]
    tokens: Callable[[Path, str], int] = lambda folder, printed: int(printed.split()[-1])
    path: tuple[Path, ...] = ()
    folder: Path = ROOT
    missing: str | None = None


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """All tools by name."""
    work, peer = options.work, options.peer_python
    folder = elsewhere(byte_level_tokenizer, work, options.vocab_size)
    model = elsewhere(sentencepiece_model, work, options.vocab_size) if options.sentencepiece else None

    def ours(backend: str, kind: str = "HuggingFaceTokenizer", model: Path = folder, template: str = "chatml"):
        def command(samples: Path, results: Path) -> list[str]:
            words = (
                f"--chat-template {template} --tokenizer-type {kind} --tokenizer-backend {backend} --seq-length 4096"
            )
            return [
                *(
                    sys.executable,
                    str(ROOT / "tools/preprocess_data.py"),
                    *words.split(),
                    "--workers",
                    "1",
                    "--on-error",
                    "skip",
                ),
                *("--task", f"code={samples / 'messages'}", "--tokenizer-model", str(model)),
                *("--output-prefix", str(results / "set")),
            ]

        return Contender(command, lambda results, printed: _in_ledger(results / "set_dataset.json"), (ROOT,))

    def bare(name: str, model: Path = folder, module: str | None = None) -> Contender:
        python = next((python for python in (sys.executable, peer) if python and _has(python, module or name)), None)

        def command(samples: Path, results: Path) -> list[str]:
            file = str(samples / "text/text.jsonl")
            return [python, str(Path(__file__).with_name("peers.py")), name, file, str(model)]

        return Contender(command, missing=None if python else f"{module or name} is not installed")

    found = {
        OURS: ours("auto"),
        "preprocess_data.py, hf": ours("hf"),
        "tokenizers.encode_batch": bare("tokenizers"),
        "gigatoken": bare("gigatoken"),
        "tiktoken": bare("tiktoken"),
        "datasets.map": bare("datasets"),
        "MFTCoder, offline": _mftcoder(options, folder),
        "Megatron-LM, preprocess_data.py": _megatron(options, folder, "preprocess_data.py", "--workers 1"),
        "Megatron-LM, preprocess_data_fast.py": _megatron(
            options, folder, "preprocess_data_fast.py", "--use-gigatoken"
        ),
    }
    if model is not None:
        kind = "SentencePieceTokenizer"
        found["preprocess_data.py, SentencePiece, auto"] = ours("auto", kind, model, "mftcoder")
        found["preprocess_data.py, sentencepiece"] = ours("sentencepiece", kind, model, "mftcoder")
        found["sentencepiece"] = bare("sentencepiece", model)
    return found


def elsewhere(function: Callable[..., Path], *arguments) -> Path:
    """Call a function in another process: the peak memory of a child starts with that of its parent."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _mftcoder(options: argparse.Namespace, tokenizer: Path) -> Contender:
    if options.mftcoder is None:
        return Contender(lambda *_: [], missing="--mftcoder is not given")
    source = options.mftcoder / "mftcoder_accelerate/src"

    def command(samples: Path, results: Path) -> list[str]:
        script = str(source / "offline_tokenization/concat_sst_bin_tokenization.py")
        words = "--dataset-name set --parallel 1 --seq-length 4096"
        paths = ("--data-path", samples / "chat_rounds", "--model-path", tokenizer, "--output-path", results)
        return [options.peer_python or sys.executable, script, *words.split(), *map(str, paths)]

    return Contender(command, lambda results, printed: _in_bin(results), (source,), source)


def _megatron(options: argparse.Namespace, tokenizer: Path, script: str, more: str) -> Contender:
    if options.megatron_lm is None:
        return Contender(lambda *_: [], missing="--megatron-lm is not given")

    def command(samples: Path, results: Path) -> list[str]:
        words = f"--tokenizer-type HuggingFaceTokenizer --append-eod {more}"
        paths = ("--input", samples / "text/text.jsonl", "--output-prefix", results / "set")
        return [
            *(options.peer_python or sys.executable, str(options.megatron_lm / "tools" / script), *words.split()),
            *("--tokenizer-model", str(tokenizer), *map(str, paths)),
        ]

    return Contender(command, lambda results, printed: _in_bin(results), (options.megatron_lm,))


def _in_ledger(file: Path) -> int:
    return sum(task["tokens"] for task in json.loads(file.read_text())["tasks"])


def _in_bin(results: Path) -> int:
    (file,) = results.glob("*.bin")
    return file.stat().st_size // 2  # ids below 65500 take two bytes


def _has(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def run(contender: Contender, samples: Path, work: Path) -> dict[str, float]:
    """Run once: seconds of CPU and wall, peak memory of the largest process in MiB, and tokens.

    Raises:
        RuntimeError: it failed; the message ends with its last output.
    """
    with tempfile.TemporaryDirectory(dir=work) as results:
        shim = Path(results) / "shim"
        shim.mkdir()
        (shim / "sitecustomize.py").write_text(SHIM)
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        offline = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(shim)}
        path = os.pathsep.join(map(str, (shim, *contender.path)))
        environment = {**os.environ, **one_thread, **offline, "PYTHONPATH": path}
        # compiled modules are kept, as in an installation
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = contender.command(samples, Path(results))
        with open(shim / "log", "w+b") as log:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=contender.folder)
            _, status, usage = os.wait4(process.pid, 0)  # with the children it has waited for
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            printed = log.read().decode(errors="replace")
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: …{printed[-600:]}")
        scale = 1024 if sys.platform == "darwin" else 1
        return {
            "cpu": usage.ru_utime + usage.ru_stime,
            "wall": wall,
            "rss": usage.ru_maxrss / scale / 1024,
            "tokens": contender.tokens(Path(results), printed),
        }


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """Measure all tools: medians over the rounds, ratios to ours round by round."""
    make = functools.partial(elsewhere, write_samples, options.work)
    samples, few = (make(number, options.mean_tokens, options.seed) for number in (options.samples, 10))
    results: dict[str, dict] = {}
    running = {}
    for name, contender in contenders(options).items():
        if options.only and name not in options.only:
            continue
        results[name] = {"missing": contender.missing}
        if contender.missing is None:
            try:
                run(contender, few, options.work)  # this warms disk caches, and compiles modules
                results[name]["startup"] = run(contender, few, options.work)["cpu"]
                running[name] = contender
            except RuntimeError as error:
                results[name]["missing"] = str(error)
    readings = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, contender in running.items():
            readings[name].append(run(contender, samples, options.work))
    for name, taken in readings.items():
        results[name].update({key: statistics.median(one[key] for one in taken) for key in taken[0]})
        results[name]["readings"] = taken
        if OURS in readings:
            pairs = zip(taken, readings[OURS], strict=True)
            results[name]["to_ours"] = statistics.median(one["cpu"] / ours["cpu"] for one, ours in pairs)
        if name.startswith("preprocess_data.py") and options.larger:
            many = make(options.larger * options.samples, options.mean_tokens, options.seed)
            results[name]["rss_larger"] = run(running[name], many, options.work)["rss"]
    return results


def table(results: dict[str, dict], larger: int) -> str:
    """Format all numbers as Markdown."""
    lines = [
        f"| | CPU s | of it start-up | wall s | × ours | tokens | peak MiB | with {larger} × the samples |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in results.items():
        if one["missing"]:
            lines.append(f"| {name} | left out: {' '.join(one['missing'].split())[-300:]} | | | | | | |")
            continue
        rss = f"{one['rss_larger']:.0f}" if "rss_larger" in one else ""
        ratio = f"{one['to_ours']:.2f}" if "to_ours" in one else ""
        lines.append(
            f"| {name} | {one['cpu']:.2f} | {one['startup']:.2f} | {one['wall']:.1f} | {ratio} | {one['tokens']:.0f} "
            f"| {one['rss']:.0f} | {rss} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Processor and versions in a line."""
    versions = []
    for package in ("tokenizers", "gigatoken", "sentencepiece", "numpy"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{processor()}; Python {platform.python_version()}, {', '.join(versions)}"


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--mean-tokens", type=float, default=310, help="tokens of a sample")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3, help="the median is reported")
    parser.add_argument("--larger", type=int, default=4, help="peak memory with so many times the samples; 0: not")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders")
    parser.add_argument("--sentencepiece", action="store_true", help="train a SentencePiece model, too, and compare it")
    parser.add_argument("--megatron-lm", type=lambda word: Path(word).resolve(), metavar="DIR", help="a checkout")
    parser.add_argument("--mftcoder", type=lambda word: Path(word).resolve(), metavar="DIR", help="a checkout")
    parser.add_argument("--peer-python", metavar="PYTHON", help="has what the others need: torch, datasets, …")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mft-benchmark-data", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    print(machine())
    print(f"{options.samples} samples, {options.rounds} rounds, one process each\n", flush=True)
    results = measure(options)
    print(table(results, options.larger))
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
