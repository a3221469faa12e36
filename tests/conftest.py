"""The tokenizer and the data set that many tests use."""

import json
import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
from tests import source_code
from tests.made_tokenizer import write_tokenizer
from tests.ranks import run_tool

# no test depends on the speed of the machine
settings.register_profile("without clocks", deadline=None)
settings.load_profile("without clocks")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The folder of :mod:`tests.made_tokenizer`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def _task_records():
    """Make four tasks of very different size from functions, each in another record format.

    The last two are so small that steps of 8 packs, or micro-batches, lack them although packs and order mix tasks.
    """
    code = [text for text in source_code.functions(seed=14, count=136) if 60 < len(text) < 260]
    return {
        "completion": [{"prompt": text[:40], "completion": text[40:]} for text in code],
        "explain": [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.split("(")[0]}]}
            for text in code[::2]
        ],
        "write": [{"instruction": text.split("\n")[0], "input": "", "output": text} for text in code[::6]],
        "read": [{"text": text} for text in code[::15]],
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
