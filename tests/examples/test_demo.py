"""The demo's input, made by its two commands: what the tasks must hold, and that the tokenizer loses nothing."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo"
TASKS = ["completion", "fim", "function_to_docstring", "docstring_to_function", "function_to_usage"]  # largest first

TORTURE = [
    "",
    " ",
    "  leading, double  and trailing  ",
    "\ttabs\tand\r\nboth\n\n\nline ends\x0b\x0c\x1c\u2028\u0085",
    "def f(x):\n    if x:\n        return {'k': [1, 2.5e-3, 0xFF]}\n",
    "naïve Zoë – “quotes” … 漢字かな 한국어 עברית العربية ไทย",
    "😀👩\u200d👩\u200d👧\u200d👦🇨🇭 e\u0301 vs é, ﬁ, Å, \ufeff, \x00\x7f",
    "<|im_start|>user\n<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|><|im_end|><|endoftext|><|pad|>",
    "<|im_start| >no token<|endoftex|>",
    "".join(map(chr, range(0x250))),
]

# What the standard library has too, but not where a small run is sure to see it.
CORNERS = '''
import math
from fractions import Fraction


def unlike(n):
    """Examples of every kind that can be asserted on.

    >>> half, third = Fraction(1, 2), Fraction(1, 3)
    >>> unlike(half), math.ceil(third)
    (0.5, 1)
    >>> unlike(2) or half
    'two'
    >>> unlike(n=1) is half
    False
    >>> unlike(third)
    Fraction(1, 3)
    >>> print(unlike(4))
    4
    >>> unlike(5)
    5
    """
    return n


def abridged(n):
    """The value is shown in part.

    >>> abridged(3)
    [3, 3, ...]
    """
    return [n] * n * n


def printed(n):
    """Two numbers are no value.

    >>> printed(3)
    3 -3
    """
    print(n, -n)


def directed(n):
    """A directive says that the value is not to be taken at its word.

    >>> directed(3)  # doctest: +SKIP
    4
    """
    print("less")
    return n


def unknown(n):
    """The example needs a name from elsewhere.

    >>> unknown(elsewhere)
    1
    """
    print("more")
    return n


def first_twin(n):
    """Told one way, at some length."""
    n = n + 1
    return n


class Family:
    def first_twin(n):
        """Told another way, at some length."""
        n = n + 1
        return n

    def left_of_its_class(n):
        """A text that reaches further left, so that the method does not parse on its own."""
        return """
left
"""
'''


def run_script(name, *options, hash_seed="0"):
    """Run one of the demo's scripts and return its completed process."""
    command = [sys.executable, str(DEMO / name), *map(str, options)]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)


def read_task(folder, name):
    # Not splitlines(): a sample may hold a line separator that JSON does not need to escape.
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_docstring(source):
    body = ast.parse(source).body[0].body
    if not (isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)):
        return source.rstrip()
    lines = source.split("\n")
    return "\n".join(lines[: body[0].lineno - 1] + lines[body[0].end_lineno :]).rstrip()


def fenced_code(text):
    [code] = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    return code


def function_of(task, record):
    """The source of the function that a record was made of, without its docstring."""
    if task == "completion":
        return without_docstring(record["prompt"] + record["completion"])
    if task == "fim":
        prompt = r"<\|fim_prefix\|>(.*)<\|fim_suffix\|>(.*)<\|fim_middle\|>"
        prefix, suffix = re.fullmatch(prompt, record["prompt"], re.DOTALL).groups()
        return without_docstring(prefix + record["completion"] + suffix)
    if task == "function_to_docstring":
        return fenced_code(record["chat_rounds"][0]["content"])
    if task == "docstring_to_function":
        return fenced_code(record["messages"][1]["content"])
    return record["input"].rstrip()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tasks at a tenth of their size, out of the whole standard library, and what the command printed."""
    folder = tmp_path_factory.mktemp("tasks")
    process = run_script("make_tasks.py", "--output-dir", folder, "--scale", "0.1")
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture(scope="module")
def some_modules(tmp_path_factory):
    """A part of the standard library, for runs that need not see all of it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folder = tmp_path_factory.mktemp("modules")
    for name in ("statistics", "textwrap", "difflib", "random", "posixpath", "linecache", "traceback", "pdb"):
        shutil.copy(library / f"{name}.py", folder)
    (folder / "corners.py").write_text(CORNERS, encoding="utf-8")
    shutil.copytree(library / "email", folder / "email")
    (folder / "test").mkdir()
    (folder / "test" / "corners.py").write_text(CORNERS.replace("unlike", "never_read"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    process = run_script("train_tokenizer.py", "--tasks-dir", made[0], "--output-dir", folder, "--vocab-size", 1024)
    assert process.returncode == 0, process.stderr
    return folder


def test_five_tasks_with_a_realistic_imbalance(made):
    folder, printed = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{task}.jsonl" for task in TASKS)
    samples = {task: len(read_task(folder, task)) for task in TASKS}
    assert sorted(samples, key=lambda task: -samples[task]) == TASKS
    assert 10 <= samples["completion"] / samples["function_to_usage"] <= 20
    for task in TASKS:
        size = (folder / f"{task}.jsonl").stat().st_size
        assert re.search(rf"^{task} +{samples[task]} +{size} +\d+$", printed, re.MULTILINE)
        assert f"── {task} ─" in printed


@pytest.mark.parametrize("task", TASKS)
def test_every_record_has_the_shape_of_its_task_and_no_two_are_equal(made, task):
    keys = {
        "completion": ["prompt", "completion"],
        "fim": ["prompt", "completion"],
        "function_to_docstring": ["chat_rounds"],
        "docstring_to_function": ["messages"],
        "function_to_usage": ["instruction", "input", "output"],
    }[task]
    records = read_task(made[0], task)
    for record in records:
        assert list(record) == keys
        for value in record.values():
            texts = [value] if isinstance(value, str) else [turn["content"] for turn in value]
            assert all(text.strip() for text in texts)
    if task == "function_to_docstring":
        assert {tuple(turn["role"] for turn in record["chat_rounds"]) for record in records} == {("human", "bot")}
    if task == "docstring_to_function":
        assert {tuple(turn["role"] for turn in record["messages"]) for record in records} == {("user", "assistant")}
    assert len({json.dumps(record) for record in records}) == len(records)


@pytest.mark.parametrize("task", TASKS)
def test_the_code_in_every_record_is_one_function(made, task):
    for record in read_task(made[0], task):
        [function] = ast.parse(function_of(task, record)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)


def test_questions_are_whole_and_do_not_give_the_answer_away(made):
    folder, _ = made
    for record in read_task(folder, "function_to_docstring"):
        question, answer = (turn["content"] for turn in record["chat_rounds"])
        assert answer not in question
    for record in read_task(folder, "docstring_to_function"):
        question, answer = (turn["content"] for turn in record["messages"])
        assert fenced_code(answer).startswith(fenced_code(question))  # the signature, and then more
        assert without_docstring(fenced_code(answer)) == fenced_code(answer)
    for record in read_task(folder, "completion"):
        assert record["completion"].strip() not in record["prompt"]
        ast.parse(record["prompt"])  # the cut is behind the docstring or the first statement, not inside it


def test_a_function_serves_one_task_only(made, some_modules, tmp_path):
    run_script("make_tasks.py", "--output-dir", tmp_path, "--source-dir", some_modules)
    for folder in (made[0], tmp_path):
        functions = [function_of(task, record) for task in TASKS for record in read_task(folder, task)]
        assert len(functions) == len(set(functions))


def test_the_tests_made_of_doctests_hold(made, tmp_path):
    outputs = [record["output"] for record in read_task(made[0], "function_to_usage")]
    tests = [output for output in outputs if "assert " in output]
    assert len(tests) >= 5
    for test in tests:
        assert test.count("\nassert ") or test.startswith("assert ")
        process = subprocess.run([sys.executable, "-c", test], capture_output=True, encoding="utf-8", cwd=tmp_path)
        assert process.returncode == 0, f"{test}\n{process.stderr}"


def test_doctests_become_assertions_up_to_the_first_that_cannot(some_modules, tmp_path):
    run_script("make_tasks.py", "--output-dir", tmp_path, "--source-dir", some_modules)
    records = read_task(tmp_path, "function_to_usage")
    outputs = {record["instruction"]: record["output"] for record in records if "corners`" in record["instruction"]}
    assert outputs == {
        "Write a test for `unlike` from the module `corners`.": (
            "from corners import Fraction, math, unlike\n\n"
            "half, third = Fraction(1, 2), Fraction(1, 3)\n"
            "assert (unlike(half), math.ceil(third)) == (0.5, 1)\n"
            "assert (unlike(2) or half) == 'two'\n"
            "assert (unlike(n=1) is half) is False\n"
            "assert repr(unlike(third)) == 'Fraction(1, 3)'"
        )
    }


@pytest.mark.smoke
def test_usage_without_doctests_shows_calls_of_the_function(some_modules, tmp_path):
    run_script("make_tasks.py", "--output-dir", tmp_path, "--source-dir", some_modules)
    calls = [record for record in read_task(tmp_path, "function_to_usage") if "assert " not in record["output"]]
    assert calls
    for record in calls:
        function = re.search("`(.*)`", record["instruction"]).group(1)
        imported, *statements = ast.parse(record["output"]).body
        assert ast.unparse(imported) == f"import {function.rpartition('.')[0]}"
        assert statements
        assert all(f"{function}(" in ast.unparse(statement) for statement in statements)


def test_same_seed_same_bytes_whatever_the_hash_seed(some_modules, tmp_path):
    for folder, hash_seed, seed in (("first", "1", "7"), ("again", "2", "7"), ("other", "1", "8")):
        options = ("--output-dir", tmp_path / folder, "--source-dir", some_modules, "--seed", seed)
        run_script("make_tasks.py", *options, hash_seed=hash_seed)
    first = files_of(tmp_path / "first")
    assert files_of(tmp_path / "again") == first
    assert all(files_of(tmp_path / "other")[name] != content for name, content in first.items())


def test_caps_and_lengths(some_modules, tmp_path):
    options = ("--source-dir", some_modules, "--max-samples", "fim=3", "--max-samples", "completion=5")
    run_script("make_tasks.py", "--output-dir", tmp_path, *options, "--max-chars", "300")
    assert (len(read_task(tmp_path, "fim")), len(read_task(tmp_path, "completion"))) == (3, 5)
    for task in TASKS:
        for record in read_task(tmp_path, task):
            turns = record.get("messages") or record.get("chat_rounds")
            texts = [turn["content"] for turn in turns] if turns else list(record.values())
            assert sum(map(len, texts)) <= 300


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "make_tasks.py",
            ["--max-samples", "fimm=3"],
            "'fimm=3' is not NAME=NUMBER with NAME one of function_to_usage",
        ),
        ("make_tasks.py", ["--max-samples", "fim=many"], "'fim=many' is not NAME=NUMBER"),
        ("train_tokenizer.py", ["--tasks-dir", "nowhere"], "no .jsonl file in nowhere; make them with"),
        (
            "train_tokenizer.py",
            ["--tasks-dir", "TASKS", "--vocab-size", "100"],
            "--vocab-size 100 is too small for 256",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(made, tmp_path, script, options, message):
    options = [made[0] if option == "TASKS" else option for option in options]
    process = run_script(script, *options, "--output-dir", tmp_path / "out")
    assert process.returncode == 2
    assert message in process.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_tokenizer_is_deterministic(made, tokenizer_folder, tmp_path):
    options = ("--tasks-dir", made[0], "--output-dir", tmp_path, "--vocab-size", 1024)
    run_script("train_tokenizer.py", *options, hash_seed="3")
    assert files_of(tmp_path) == files_of(tokenizer_folder)


def test_transformers_loads_the_tokenizer_and_gets_every_text_back(made, tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(tokenizer) == 1024
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    special = ["<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", *special]) == list(range(7))
    assert all(tokenizer(token).input_ids == [number] for number, token in enumerate(special, start=2))
    assert set(special) < set(tokenizer.all_special_tokens)

    samples = [record["prompt"] + record["completion"] for record in read_task(made[0], "fim")]
    for text in TORTURE + samples:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(text.encode())
    code = "".join(samples)
    assert len(tokenizer(code).input_ids) < len(code) / 2  # it has learnt merges
