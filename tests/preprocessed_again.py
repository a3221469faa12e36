"""The tasks of a data set, preprocessed once more with other options."""

import json
from pathlib import Path

from tests.ranks import run_tool


def preprocess_again(dataset_prefix, output_prefix, *words):
    """Preprocess the task files of a data set for 128 tokens with its tokenizer and more options."""
    ledger = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())
    tasks = [word for task in ledger["tasks"] for word in ("--task", f"{task['name']}={task['sources'][0]['path']}")]
    process = run_tool(
        *("tools/preprocess_data.py", *tasks, "--tokenizer-model", ledger["tokenizer"]["model"]),
        *("--seq-length", 128, "--output-prefix", output_prefix, *words),
    )
    assert process.returncode == 0, process.stderr
