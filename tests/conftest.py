"""The tokenizer and the data set that many tests use."""

import json
import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
from tests.made_tokenizer import write_tokenizer
from tests.ranks import run_tool
from tests.task_records import task_records

# no test depends on the speed of the machine
settings.register_profile("without clocks", deadline=None)
settings.load_profile("without clocks")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The folder of :mod:`tests.made_tokenizer`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def dataset_prefix(tmp_path_factory, tokenizer_folder):
    """A data set of four imbalanced tasks, packed for 128 tokens by the command line."""
    folder = tmp_path_factory.mktemp("dataset")
    tasks = []
    for name, records in task_records(136).items():
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
