"""Running a function on several gloo ranks from plain pytest.

The ranks are forked from a server that has imported torch and Megatron-Core once, so that a case costs its own work and
not eight imports.
"""

import argparse
import ast
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

_context = multiprocessing.get_context("forkserver")
# torch imports its compiler when the first optimizer is made, half a second on each rank
_context.set_forkserver_preload(["mft_megatron.training.pretrain", "torch._dynamo"])


def _rank_main(pipe, rank, world_size, port, function, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        import torch

        torch.set_num_threads(1)
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))  # tensors by value, not by file handle
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_ranks(world_size, function, *arguments, timeout=180):
    """Call ``function(*arguments)`` on ``world_size`` ranks; its results, by rank.

    ``function`` is a module-level function and starts the process groups itself. A rank that fails fails the test with
    its traceback; the others are ended. Where another process took the port meanwhile all begin anew with another one:
    nothing has happened before the process groups stand.
    """
    for _ in range(4):
        try:
            return _run_on_ranks(world_size, _free_port(), function, arguments, timeout)
        except _PortTakenError:
            pass
    pytest.fail("another process took the port of rank 0, four times in a row")


class _PortTakenError(Exception):
    """Rank 0 cannot listen."""


def _run_on_ranks(world_size, port, function, arguments, timeout):
    ranks = []
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(there, rank, world_size, port, function, arguments))
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        results = [None] * world_size
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout)
            if not ready:
                pytest.fail(f"ranks {sorted(waiting.values())} gave no result within {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    succeeded, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    pytest.fail(f"rank {rank} of {world_size} died without a word")
                if not succeeded and "EADDRINUSE" in results[rank]:
                    raise _PortTakenError
                if not succeeded:
                    pytest.fail(f"rank {rank} of {world_size}:\n{results[rank]}")
        for process, _ in ranks:
            process.join(30)
        return results
    finally:
        for process, _ in ranks:
            if process.is_alive():
                process.kill()


def run_tool(*command, **options):
    """Run one of the project's commands as a user would; the completed process, with its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def torchrun(world_size, *command):
    """Run a script on ``world_size`` ranks as a user would."""
    # standalone: ranks meet where torchrun itself listens, so that no other process takes the port meanwhile
    return run_tool(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *command, timeout=300
    )


def refusal(process) -> str:
    """The one line with which a command refused bad input; checks that it is one and that nothing else was said."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0, process.stdout
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    return lines[0]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A Hugging Face tokenizer folder: byte-level BPE with 500 ids, trained on a module of the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text()], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "pad_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _task_records():
    """Four tasks out of a standard module's functions, of very different size and in different record shapes."""
    tree = ast.parse(Path(argparse.__file__).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    code = [ast.unparse(node) for node in functions]
    code = [text for text in code if 60 < len(text) < 260]
    return {
        "completion": [{"prompt": text[:40], "completion": text[40:]} for text in code],
        "explain": [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.split("(")[0]}]}
            for text in code[::2]
        ],
        "write": [{"instruction": text.split("\n")[0], "input": "", "output": text} for text in code[::4]],
        "read": [{"text": text} for text in code[::9]],
    }


@pytest.fixture(scope="session")
def dataset_prefix(tmp_path_factory, tokenizer_folder):
    """A data set of four imbalanced tasks, packed for 128 tokens by the command line."""
    folder = tmp_path_factory.mktemp("dataset")
    tasks = []
    for name, records in _task_records().items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        tasks += ["--task", f"{name}={path}"]
    process = run_tool(
        "tools/preprocess_data.py",
        *tasks,
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder),
        *("--chat-template", "chatml", "--seq-length", 128, "--split", "80,20,0", "--output-prefix", folder / "mixed"),
    )
    assert process.returncode == 0, process.stderr
    return str(folder / "mixed")
