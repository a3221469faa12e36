"""Task files: the effect of each setting, and the line that an error names."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.storage.ledger import OVERLONG
from mft_megatron.data.tasks.task_file import read_task_file
from mft_megatron.data.tasks.task_files import TaskFiles, parse_tasks
from mft_megatron.errors import InputError

FILES = ("a.jsonl", "b.jsonl", "d/e.parquet", "d/f.jsonl.gz", "d/notes.txt", "my [old] data/g.jsonl")


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(folder, text):
    path = folder / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    return read_task_file(path)


def test_every_setting(folder):
    text = """
code:
  path: a.jsonl
  format: question_answer
  template: chatml
  weight: 2
  sampling: 0.5
  overlong: truncate-left
  fim_rate: 0.9
chat:
  paths: [b.jsonl, d]
"""
    assert read(folder, text) == {
        "code": TaskFiles("code", (folder / "a.jsonl",), "question_answer", "chatml", 2.0, 0.5, "truncate-left", 0.9),
        "chat": TaskFiles(
            "chat",
            (folder / "b.jsonl", folder / "d/e.parquet", folder / "d/f.jsonl.gz"),
            left_out=(folder / "d/notes.txt",),
        ),
    }


@pytest.mark.parametrize(
    "text",
    [
        "x: a.jsonl\ny: [b.jsonl]\n",
        "x: {path: a.jsonl}\ny: {paths: b.jsonl}\n",
        "- {name: x, path: a.jsonl}\n- {name: y, paths: [b.jsonl]}\n",
        "\ufeffx: {name: x, path: a.jsonl}\ny: b.jsonl\n",
        '{"x": "a.jsonl", "y": {"path": ["b.jsonl"]}}',
    ],
)
def test_different_ways_to_write_the_same_tasks(folder, text):
    tasks = read(folder, text)
    assert tasks == parse_tasks((f"x={folder / 'a.jsonl'}", f"y={folder / 'b.jsonl'}"))
    assert list(tasks) == ["x", "y"]


def test_settings_may_be_shared(folder):
    text = "x: &common\n  path: a.jsonl\n  weight: 2\ny:\n  <<: *common\n  path: b.jsonl\n"
    assert read(folder, text)["y"] == TaskFiles("y", (folder / "b.jsonl",), weight=2.0)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("'*.jsonl'", ["a.jsonl", "b.jsonl"]),
        ("'**/*.jsonl*'", ["a.jsonl", "b.jsonl", "d/f.jsonl.gz", "my [old] data/g.jsonl"]),
        ("'d/*'", ["d/e.parquet", "d/f.jsonl.gz"]),
        ("'[bd]*'", ["b.jsonl", "d/e.parquet", "d/f.jsonl.gz"]),
        ("my [old] data/g.jsonl", ["my [old] data/g.jsonl"]),
        ("['b*', a.jsonl]", ["b.jsonl", "a.jsonl"]),
    ],
)
def test_patterns(folder, pattern, names):
    assert read(folder, f"t:\n  path: {pattern}\n")["t"].files == tuple(folder / name for name in names)


def test_the_folders_name_is_no_pattern(folder):
    inner = folder / "set[1]"
    inner.mkdir()
    (inner / "a.jsonl").write_bytes(b"")
    assert read(inner, "t: '*.jsonl'")["t"].files == (inner / "a.jsonl",)


def test_absolute_paths_and_template_files(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "z.jsonl"
    other.write_bytes(b"")
    task = read(folder, f"t:\n  path: {other}\n  template: templates/mine.jinja\n")["t"]
    assert task.files == (other,)
    assert task.template == str(folder / "templates/mine.jinja")


def test_numbers_that_yaml_reads_as_text(folder):
    task = read(folder, "t: {path: a.jsonl, weight: 1e-3, sampling: '2', fim_rate: 0}")["t"]
    assert (task.weight, task.sampling, task.fim_rate) == (0.001, 2.0, 0.0)


@pytest.mark.parametrize("value", OVERLONG)
def test_overlong_choices(folder, value):
    assert read(folder, f"t: {{path: a.jsonl, overlong: {value}}}")["t"].overlong == value


def setting(line):
    return f"x: b.jsonl\nt:\n  path: a.jsonl\n  {line}\n"


REFUSED = [
    ("", "tasks.yaml: holds no task"),
    ("[]", "tasks.yaml: holds no task"),
    ("{}", "tasks.yaml: holds no task"),
    ("just text", "tasks.yaml: holds no task"),
    ("x: [a.jsonl\ny: 1", "tasks.yaml:2: not YAML"),
    ("x: a.jsonl\n\ty: b", "tasks.yaml:2: not YAML"),
    ("x: !!python/object:os.system a", "tasks.yaml:1: not YAML"),
    ("x: *nowhere", "tasks.yaml:1: not YAML"),
    ("x: &x\n  path: a.jsonl\n  weight: [*x]", "tasks.yaml:3: not YAML"),
    ("x: \x07", "tasks.yaml: not YAML"),
    ("x: 2024-99-99", "tasks.yaml: not YAML"),
    ("a: 1\n---\nb: 2", "tasks.yaml:2: not YAML"),
    ("x: a.jsonl\nx: b.jsonl", "tasks.yaml:2: task x: is there twice"),
    ("- a.jsonl", "tasks.yaml:1: a task in a list"),
    ("- {name: x, path: a.jsonl}\n- {path: b.jsonl}", "tasks.yaml:2: a task without a name"),
    ("\n1: a.jsonl", "tasks.yaml:2: a task's name is text; write it in quotes: '1'"),
    ("? [a]\n: a.jsonl", "tasks.yaml:1: a task's name is text"),
    ("a,b: a.jsonl", "tasks.yaml:1: the task name 'a,b'"),
    ("'a=b': a.jsonl", "tasks.yaml:1: the task name 'a=b'"),
    ("' a': a.jsonl", "tasks.yaml:1: the task name ' a'"),
    ("'': a.jsonl", "tasks.yaml:1: the task name ''"),
    ("\nmacro: a.jsonl", "tasks.yaml:2: a task cannot be called macro"),
    ("- {name: objective, path: a.jsonl}", "tasks.yaml:1: a task cannot be called objective"),
    ("t: c.jsonl", "tasks.yaml:1: task t: no such file or folder"),
    ("t: 'c*.jsonl'", r"tasks.yaml:1: task t: no file matches c\*.jsonl"),
    ("t: 'd/*.txt'", "tasks.yaml:1: task t: .*there is notes.txt"),
    ("t: d/notes.txt", "tasks.yaml:1: task t: notes.txt is of no known kind"),
    ('t: "a\\0b"', "tasks.yaml:1: task t: no such file"),
    ("t: 7", "tasks.yaml:1: task t: a path is text"),
    ("t:", "tasks.yaml:1: task t: a path is text"),
    ("t: []", "tasks.yaml:1: task t: a path is text"),
    ("t: [a.jsonl, 1]", "tasks.yaml:1: task t: a path is text"),
    ("t: [a.jsonl, ./a.jsonl]", "tasks.yaml:1: task t: the task already has"),
    ("t: ['*.jsonl', a.jsonl]", "tasks.yaml:1: task t: the task already has"),
    ("t:\n  weight: 1", "tasks.yaml:1: task t: give path or paths$"),
    ("t:\n  path: a.jsonl\n  paths: b.jsonl", "tasks.yaml:1: task t: give path or paths, not both"),
    (setting("name: u"), "tasks.yaml:4: task t: name says otherwise"),
    (setting("path: b.jsonl"), "tasks.yaml:2: task t: path is given twice"),
    (setting("wieght: 2"), "tasks.yaml:4: task t: unknown setting 'wieght'; did you mean weight?"),
    (setting("shape: text"), "tasks.yaml:4: task t: unknown setting 'shape'; known: name, path"),
    (setting("? [weight]\n  : 1"), "tasks.yaml:4: task t: unknown setting"),
    (setting("weight: -1"), "tasks.yaml:4: task t: weight must be a number, 0 or more, not '-1'"),
    (setting("weight: .inf"), "tasks.yaml:4: task t: weight must be"),
    (setting("weight: .nan"), "tasks.yaml:4: task t: weight must be"),
    (setting("weight: yes"), "tasks.yaml:4: task t: weight must be .*'True'"),
    (setting("weight:"), "tasks.yaml:4: task t: weight must be"),
    (setting("weight: [1]"), "tasks.yaml:4: task t: weight must be"),
    (setting("weight: 1" + "0" * 400), "tasks.yaml:4: task t: weight must be"),
    (setting("sampling: 0"), "tasks.yaml:4: task t: sampling must be a number above 0"),
    (setting("sampling: many"), "tasks.yaml:4: task t: sampling must be"),
    (setting("fim_rate: 1.5"), "tasks.yaml:4: task t: fim_rate must be from 0 to 1"),
    (setting("fim_rate: -0.1"), "tasks.yaml:4: task t: fim_rate must be"),
    (setting("format: alpaca"), "tasks.yaml:4: task t: format: unknown value 'alpaca'; known: auto, messages"),
    (setting("format: message"), "tasks.yaml:4: task t: format: .*did you mean messages"),
    (setting("overlong: trunc"), "tasks.yaml:4: task t: overlong: .*did you mean truncate"),
    (setting("overlong: [drop]"), "tasks.yaml:4: task t: overlong: unknown value"),
    (setting("template: ''"), "tasks.yaml:4: task t: template must be text"),
    (setting("template: 3"), "tasks.yaml:4: task t: template must be text"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_errors_name_the_line(folder, text, message):
    with pytest.raises(InputError, match=f"^{re.escape(str(folder))}/{message}") as caught:
        read(folder, text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(folder):
    with pytest.raises(InputError, match=r"--task-file .*none\.yaml: No such file"):
        read_task_file(folder / "none.yaml")
    with pytest.raises(InputError, match=r"--task-file .*d: Is a directory"):
        read_task_file(folder / "d")
    (folder / "latin.yaml").write_bytes("é: a.jsonl".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml: not UTF-8 \(byte 0\)"):
        read_task_file(folder / "latin.yaml")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a.jsonl", "d", "*", "1e3", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "path", "paths", "weight", "format", "template", "sampling", "overlong", "fim_rate"]
            )
            | st.integers(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(values | st.text(max_size=30))
def test_any_yaml_is_read_or_refused(tmp_path_factory, value):
    import yaml

    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_bytes(b"")
    text = value if isinstance(value, str) else yaml.safe_dump(value)
    try:
        tasks = read(folder, text)
    except InputError:
        return
    assert tasks
    assert all(task.name == name and task.files for name, task in tasks.items())


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    (tmp_path / "tasks.yaml").write_text(f"long:\n  path: {'x' * 5000}\n")
    with pytest.raises(InputError, match=r"tasks\.yaml:2: task long: .*x…: File name too long"):
        read_task_file(tmp_path / "tasks.yaml")
