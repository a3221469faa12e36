"""The main job on real input, from raw code to a model that completes functions: what ``make demo`` runs.

::

    standard library ─► five JSONL tasks ─► tokenizer ─► packed data set ─► train on 2 × 2 ranks ─► checkpoint
                                                     ─► resume from it ─► Hugging Face folder ─► completions

Every step prints the command it runs, so that each can be run again by hand.
"""

import argparse
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mft_megatron import parent_process

ROOT = Path(__file__).resolve().parent.parent.parent
BOLD, PLAIN = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
TASKS = ("completion", "docstring_to_function", "function_to_docstring", "function_to_usage", "fim")
MODEL = (
    "--num-layers 4 --hidden-size 192 --num-attention-heads 6 --group-query-attention --num-query-groups 2 "
    "--ffn-hidden-size 512 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights"
).split()


def run(title: str, *command: str | Path) -> None:
    """Run one step in the repository's root and show it; a step that fails ends the demo."""
    words = [str(word) for word in command]
    print(f"\n{BOLD}── {title}{PLAIN}\n$ {shlex.join(_readable(word) for word in words)}", flush=True)
    start = time.perf_counter()
    # a step, such as torchrun with its ranks, ends with the demo; torchrun ends its ranks when it gets SIGTERM
    end_with_this = functools.partial(parent_process.ask_kernel, signal.SIGTERM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, cwd=ROOT, env=environment, preexec_fn=end_with_this)
    if result.returncode:
        sys.exit(f"the demo stopped: {title!r} ended with exit code {result.returncode}")
    print(f"   ({time.perf_counter() - start:.0f} s)", flush=True)


def _readable(word: str) -> str:
    return word.replace(f"{ROOT}{os.sep}", "")


def main() -> None:
    """Run all steps of the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "demo_run", help="folder for all results; emptied first")
    parser.add_argument("--iterations", type=int, default=320, help="optimizer steps in total (default: 320)")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / "tasks").is_dir():
        sys.exit(f"error: --folder {folder}: has content that is not of a demo; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    python, start = sys.executable, time.perf_counter()
    tasks, tokenizer, data, save, hf = (folder / name for name in ("tasks", "tokenizer", "data/mft", "run", "hf"))
    half = options.iterations // 2
    run("five code tasks out of the standard library", python, "examples/demo/make_tasks.py", "--output-dir", tasks)
    run(
        "a tokenizer for them",
        *(python, "examples/demo/train_tokenizer.py", "--tasks-dir", tasks, "--output-dir", tokenizer),
    )
    run(
        "packing: one memory-mapped data set",
        *(python, "tools/preprocess_data.py"),
        *(word for name in TASKS for word in ("--task", f"{name}={tasks / (name + '.jsonl')}")),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--chat-template", "chatml"),
        *("--seq-length", "512", "--split", "95,5,0", "--workers", "2", "--output-prefix", data),
    )
    train = (
        *(python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "pretrain_mft.py"),
        *("--data-path", data, "--save", save, "--tensor-model-parallel-size", "2"),
        *("--pipeline-model-parallel-size", "2", "--micro-batch-size", "2", "--global-batch-size", "8"),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--adam-beta2", "0.95"),
        *("--train-iters", str(options.iterations), "--lr", "3e-3", "--min-lr", "3e-4", "--lr-decay-style", "cosine"),
        *("--lr-warmup-iters", "20", "--log-interval", "20", "--eval-interval", str(half), "--mft-loss", "task-token"),
    )
    run(
        f"training to step {half}: TP 2 × PP 2, every task counts the same",
        *(*train, *MODEL, "--exit-interval", str(half)),
    )
    run("resuming from the checkpoint (the model's shape comes from it)", *train, "--load", save)
    run("export to Hugging Face", python, "tools/convert_checkpoint.py", "mcore-to-hf", "--load", save, "--hf", hf)
    run("completions, by transformers", python, "examples/demo/complete.py", "--hf", hf, "--data-path", data)
    print(f"\n{BOLD}── done in {time.perf_counter() - start:.0f} s{PLAIN}")
    for path, what in (
        (tasks, "the tasks, one JSONL file each"),
        (Path(f"{data}_dataset.json"), "the data set's ledger; look inside with tools/inspect_data.py"),
        (save, "checkpoints, metrics.jsonl, config.yaml, tensorboard/"),
        (hf, "the model as a Hugging Face folder"),
    ):
        print(f"   {_readable(str(path)):32s} {what}")


if __name__ == "__main__":
    main()
