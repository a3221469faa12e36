"""examples/mft_vs_mixed: what it reads out of runs, what it makes of them, and that its commands are accepted.

No training: the runs are made by hand.
"""

import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.errors import InputError
from mft_megatron.run_folder import CheckpointInfo, write_info
from tests.ranks import run_tool
from tests.refusals import refusal

EXAMPLE = Path(__file__).parents[2] / "examples" / "mft_vs_mixed"


def _load(name):
    """Another folder's run.py is a module of the tests, too: this one's is loaded under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"mft_vs_mixed_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(EXAMPLE))
try:
    import methods
    import report
    import results
    import samples
    import trainings

    command = _load("run")
finally:
    sys.path.remove(str(EXAMPLE))

SMALL, LARGE = "usage", "completion"
SEEDS = (1, 2, 3)


def evaluation(step, small, large):
    """A run with 10 tokens of the small task and 90 of the large one."""
    return {
        "kind": "valid",
        "step": step,
        "loss": 99.0,  # the objective is not comparable between methods, and nothing may read it
        "token_loss": 0.1 * small + 0.9 * large,
        "macro_loss": (small + large) / 2,
        "tasks": {LARGE: {"loss": large}, SMALL: {"loss": small}},
    }


def step_record(step, weights, shares, balance_share=0.0):
    tasks = {
        name: {"weight": weight, "share": share}
        for name, weight, share in zip((LARGE, SMALL), weights, shares, strict=True)
    }
    return {"kind": "train", "step": step, "balance_share": balance_share, "tasks": tasks}


WITHOUT_SMALL = {**evaluation(1, 1.0, 1.0), "tasks": {LARGE: {"loss": 1.0}, SMALL: {"loss": None}}}


def write_metrics(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_by_hand(path, small, large, best_small=None):
    """Twenty steps, three evaluations; the small task is at its best in the second one, where that is given."""
    steps = [step_record(step, (3.0, 1.0), (0.75, 0.25), 0.2) for step in range(1, 18)]
    steps += [
        step_record(18, (3.0, 1.0), (1.0, None), 0.2),  # the small task was absent
        step_record(19, (1.0, 1.0), (0.5, 0.5), 0.2),
        step_record(20, (1.0, 3.0), (0.25, 0.75), 0.2),
    ]
    evaluations = [
        evaluation(0, 0.1, 0.1),  # CoBa's, before the first step
        evaluation(5, 9.0, 9.0),
        evaluation(10, small if best_small is None else best_small, large + 1),
        evaluation(20, small, large),
    ]
    event = {"kind": "event", "event": "save", "step": 20}
    return results.read_run(write_metrics(path, [*evaluations[:1], *steps, *evaluations[1:], event]))


@pytest.fixture
def comparison(tmp_path):
    """All methods with the same runs, but for three.

    ``focal-task`` is above ``task-token`` by 0.10, 0.11 and 0.12, seed by seed: clear, though the seeds lie further
    apart. ``famo`` is below by 0.4, 0 and 0.5: not clear. ``coba`` is clearly the best on the small task.
    """
    small, large = (3.0, 4.0, 5.0), (2.0, 2.5, 3.0)
    changes = {"focal-task": (0.10, 0.11, 0.12), "famo": (-0.4, 0.0, -0.5), "coba": (-1.0, -1.0, -1.01)}
    runs = {}
    for method in methods.METHODS:
        runs[method] = []
        for i, seed in enumerate(SEEDS):
            value = small[i] + changes.get(method, (0, 0, 0))[i]
            path = tmp_path / f"{method}-{seed}" / "metrics.jsonl"
            runs[method].append(run_by_hand(path, value, large[i], best_small=value - 0.5))
    return results.Comparison(runs)


def test_a_run_is_read(tmp_path):
    run = run_by_hand(tmp_path / "metrics.jsonl", small=3.0, large=2.0, best_small=2.5)
    assert run.tasks == (LARGE, SMALL)
    assert run.eval_step_E.tolist() == [5, 10, 20]
    assert run.final() == {LARGE: 2.0, SMALL: 3.0, "macro": 2.5, "by tokens": pytest.approx(2.1), "worst task": 3.0}
    assert run.best() == {LARGE: 2.0, SMALL: 2.5, "macro": 2.5, "by tokens": pytest.approx(2.1), "worst task": 3.0}
    assert run.weight_TK[0].tolist() == [0.75, 0.25]
    assert run.share_TK[17].tolist() == [1.0, 0.0]
    assert run.balance_share == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (None, "not there"),
        ([], "0 logged steps and 0 evaluations"),
        ([step_record(1, (1, 1), (0.5, 0.5)), evaluation(0, 1.0, 1.0)], "1 logged steps and 0 evaluations"),
        ([step_record(1, (1, 1), (0.5, 0.5)), WITHOUT_SMALL], f"no validation loss of {SMALL}"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(tmp_path, records, reason):
    path = tmp_path / "metrics.jsonl"
    if records is not None:
        write_metrics(path, records)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: {reason}"):
        results.read_run(path)


def test_half_a_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "st')
    with pytest.raises(InputError, match="not JSON"):
        results.read_run(path)


def test_spread_and_paired_differences(comparison):
    assert comparison.spread("token", SMALL) == results.Spread(4.0, 1.0)
    assert comparison.spread("token", SMALL, "best") == results.Spread(3.5, 1.0)
    assert comparison.spread("coba", "macro").mean == pytest.approx((2.5 + 3.25 + 4.0 - 1.505) / 3)
    difference = comparison.paired("focal-task", "task-token", SMALL)
    assert difference.mean == pytest.approx(0.11)
    assert difference.standard_error == pytest.approx(0.01 / 3**0.5)
    assert difference.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert difference.is_clear
    unclear = comparison.paired("famo", "task-token", SMALL)
    assert unclear.mean == pytest.approx(-0.3)
    assert not unclear.is_clear
    assert not comparison.paired("token", "task-token", LARGE).is_clear  # no difference at all
    assert comparison.winner(SMALL) == "coba"
    assert comparison.winner(LARGE) is None


def test_one_seed_has_no_spread(comparison):
    one = results.Comparison({method: runs[:1] for method, runs in comparison.runs.items()})
    assert one.spread("token", SMALL) == results.Spread(3.0, None)
    assert one.paired("coba", "token", SMALL) == results.Difference(-1.0, None, None)
    assert one.winner(SMALL) is None
    text = report.table(one, [1], 20)
    assert "**" not in text
    assert "±" not in text.replace("mean ±", "")


@pytest.mark.parametrize("freedom", range(1, 11))
def test_quantiles_are_those_of_students_t(freedom):
    """The density, integrated numerically: 95 % lie within."""
    bound = results.STUDENT_95[freedom - 1]
    inside, whole = (
        np.trapezoid((1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
        for x in (np.linspace(-bound, bound, 200_001), np.tan(np.linspace(-np.pi / 2, np.pi / 2, 2_000_001)[1:-1]))
    )
    assert inside / whole == pytest.approx(0.95, abs=1e-4)


def test_shares_and_weights(comparison):
    assert comparison.mean_share("token") == pytest.approx(
        {LARGE: (17 * 0.75 + 1.0 + 0.5 + 0.25) / 20, SMALL: (17 * 0.25 + 0.5 + 0.75) / 20}
    )
    assert comparison.last_weight("coba") == pytest.approx({LARGE: (0.5 + 0.25) / 2, SMALL: (0.5 + 0.75) / 2})


def rows_of(text, table):
    """The cells of a table, by the name of the row; tables count from 0."""
    lines = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")][table]
    return {
        cells[0].strip("`"): cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    }


def test_the_table(comparison):
    text = report.table(comparison, SEEDS, 20)
    final, best, token, task_token, task_sample, share, weight = (rows_of(text, number) for number in range(7))
    assert final[""] == [LARGE, SMALL, "macro", "by tokens", "worst task"]
    assert final["token"] == ["2.500 ± 0.500", "4.000 ± 1.000", "3.250 ± 0.750", "2.650 ± 0.550", "4.000 ± 1.000"]
    assert final["coba"][1] == "**2.997 ± 0.995**"
    assert best["token"][1] == "3.500 ± 1.000"
    assert "token" not in token
    assert token["focal-task"][:2] == ["+0.000 ± 0.000", "**+0.110 ± 0.006**"]
    assert task_token["famo"][1] == "-0.300 ± 0.153"
    assert set(task_sample) == {"", "---", "focal-sample", "focal-task", "focal-detached"}
    assert share["token"] == ["72.5%", "27.5%"]
    assert weight["famo"] == ["37.5%", "62.5%", "20.0%"]
    bold = re.findall(r"\*\*([^*]+)\*\*", text.split("\n\n")[1])
    assert "2.997 ± 0.995" in bold
    assert not [cell for cell in final["famo"] if cell.startswith("**")]


def test_the_json_has_every_number(comparison):
    content = json.loads(json.dumps(report.as_json(comparison, SEEDS, {"iterations": 20})))
    assert set(content["methods"]) == set(methods.METHODS)
    coba = content["methods"]["coba"]
    assert coba["runs"]["3"][-1][SMALL] == pytest.approx(3.99)
    assert coba["final"][SMALL] == {"mean": pytest.approx(2.99667, abs=1e-5), "std": pytest.approx(0.995, abs=1e-3)}
    assert coba["final minus token"][SMALL]["mean"] == pytest.approx(statistics.fmean((-1.0, -1.0, -1.01)))
    assert "final minus token" not in content["methods"]["token"]
    assert "final minus task-sample" in content["methods"]["focal-task"]


def test_the_plot(comparison, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from figures import plot

    plot(comparison, tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 20_000 < len(content) < 200_000


EXPECTED = {
    "token": ("token", "global", "static"),
    "task-token": ("task-token", "global", "static"),
    "task-sample": ("task-sample", "global", "static"),
    "micro-batch": ("task-token", "micro-batch", "static"),
    "focal-sample": ("focal-sample", "global", "static"),
    "focal-task": ("focal-task", "global", "static"),
    "focal-detached": ("focal-sample", "global", "static"),
    "self-paced": ("task-token", "global", "self-paced"),
    "famo": ("task-token", "global", "famo"),
    "coba": ("task-token", "global", "coba"),
}


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_is_a_command_that_is_accepted(method, tmp_path):
    words = methods.method_words(method, tmp_path / "data", tmp_path / "save", 3, 100, None)
    arguments = parse_arguments(words)
    chosen = arguments.multi_task
    assert (chosen.mft_loss, chosen.mft_normalization, chosen.task_balance) == EXPECTED[method]
    assert arguments.training.micro_batch_size == (1 if method == "micro-batch" else 8)
    assert chosen.focal_detach == (method == "focal-detached")
    assert arguments.initialization.seed == 3
    # besides the objective, nothing differs between methods
    same = parse_arguments(methods.method_words("token", tmp_path / "data", tmp_path / "save", 3, 100, None))
    for group in ("network", "regularization", "initialization", "learning_rate", "validation", "data", "logging"):
        assert getattr(arguments, group) == getattr(same, group)
    assert arguments.training.train_iters == same.training.train_iters == 100
    assert arguments.training.global_batch_size == same.training.global_batch_size
    assert arguments.validation.eval_interval * methods.EVALUATIONS == 100


def test_methods_start_from_their_seeds_base(tmp_path):
    base = parse_arguments(methods.base_words(tmp_path / "data", tmp_path / "base", 3, 50))
    assert base.multi_task.mft_loss == "token"
    folder = tmp_path / "base" / "iter_0000050"
    folder.mkdir(parents=True)
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("50\n")
    shape = {name: value for name, value in vars(base.network).items() if value is not None}
    info = CheckpointInfo(
        iteration=50,
        consumed_samples=1200,
        architecture=shape,
        vocab_size=2048,
        tokenizer={},
        dataset_hash="of the functions",
        seed=3,
        global_batch_size=24,
        has_optimizer=False,
    )
    write_info(folder, info)
    words = methods.method_words("coba", tmp_path / "data", tmp_path / "save", 3, 100, tmp_path / "base")
    arguments = parse_arguments(words)
    assert arguments.resume.path == folder
    assert arguments.checkpoint.finetune


def test_the_shortest_run_is_accepted(tmp_path):
    words = methods.method_words("token", tmp_path / "data", tmp_path / "save", 1, methods.SHORTEST, None)
    assert parse_arguments(words).validation.eval_interval >= 1


@pytest.mark.smoke
def test_all_runs_are_planned(tmp_path):
    prefixes = {name: tmp_path / name for name in ("tasks", "functions")}
    for name in prefixes:
        (tmp_path / f"{name}_dataset.json").write_text(name)
    bases, runs = command.plan(tmp_path, prefixes, [1, 2], 100, 200)
    assert len(bases) == 2
    assert len(runs) == 2 * len(methods.METHODS)
    assert [seed for _, seed in runs] == [1] * len(methods.METHODS) + [2] * len(methods.METHODS)
    for (_, seed), run in runs.items():
        assert run.command[run.command.index("--load") + 1] == str(bases[seed - 1].save)
    # a run depends on its base and on its data
    _, longer = command.plan(tmp_path, prefixes, [1, 2], 100, 201)
    assert longer["token", 1].command == runs["token", 1].command
    assert longer["token", 1].receipt != runs["token", 1].receipt
    (tmp_path / "tasks_dataset.json").write_text("others")
    _, others = command.plan(tmp_path, prefixes, [1, 2], 100, 200)
    assert others["token", 1].receipt != runs["token", 1].receipt
    no_bases, from_scratch = command.plan(tmp_path, prefixes, [1], 100, 0)
    assert not no_bases
    assert "--load" not in from_scratch["token", 1].command


def training(folder, name, code, inputs=""):
    return trainings.Training(name, (sys.executable, "-c", code), folder / name, inputs)


def test_a_complete_run_is_not_repeated(tmp_path):
    counter, said = tmp_path / "counter", []
    code = f"open({str(counter)!r}, 'a').write('x')"
    run = training(tmp_path, "token", code)
    assert not run.is_complete()
    for _ in range(2):
        trainings.run_all([run], 2, tmp_path, said.append)
    assert counter.read_text() == "x"
    assert "1 of 1 runs are complete already" in said[-1]
    trainings.run_all([training(tmp_path, "token", code, inputs="other data")], 2, tmp_path, said.append)
    assert counter.read_text() == "xx"
    (tmp_path / "token" / "done.json").write_text("{")
    trainings.run_all([run], 2, tmp_path, said.append)
    assert counter.read_text() == "xxx"


def test_a_failed_run_names_its_log_and_ends_the_example(tmp_path):
    failing = training(tmp_path, "famo, seed 2", "print('first\\nerror: no memory\\nlast'); exit(1)")
    later = training(tmp_path, "coba, seed 2", "")
    with pytest.raises(InputError) as error:
        trainings.run_all([failing, later], 1, tmp_path, str)
    log = tmp_path / "famo, seed 2" / "log.txt"
    assert str(error.value) == f"famo, seed 2 ended with exit code 1: no memory; see {log}"
    assert "first\n" in log.read_text()
    assert not failing.is_complete()
    assert not later.is_complete()


def test_a_run_that_dies_shows_its_last_line(tmp_path):
    with pytest.raises(InputError, match="ZeroDivisionError: division by zero; see "):
        training(tmp_path, "token", "1 / 0").run(tmp_path)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "has notes.txt, which is not of this example; name another folder"),
        (("--iterations", 11), "--iterations 11: at least 12"),
        (("--base-iterations", -1), "--base-iterations -1: at least 0"),
        (("--base-iterations", 5), "--base-iterations 5: 0, or at least 12"),
        (("--jobs", 0), "--jobs 0: at least 1"),
        (("--seeds", 1, 2, 1), "--seeds 1 2 1: "),
    ],
)
def test_bad_options_are_refused(tmp_path, words, reason):
    (tmp_path / "notes.txt").write_text("mine")
    process = run_tool(EXAMPLE / "run.py", "--folder", tmp_path, *words)
    assert reason in refusal(process)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_base_learns_from_functions_that_no_task_has(tmp_path):
    """Module by module of a small library: a function is either in one task or plain text."""
    library = tmp_path / "library"
    library.mkdir()
    for module in ("argparse", "textwrap", "statistics"):
        (library / f"{module}.py").write_text(Path(importlib.util.find_spec(module).origin).read_text())
    counts = samples.write_samples(tmp_path / "samples", library, scale=0.01)
    assert set(counts) == {*samples.TASK_NAMES, samples.FUNCTIONS}
    assert (counts["completion"], counts["fim"]) == (18, 10)
    records = {
        name: [json.loads(line) for line in (tmp_path / "samples" / f"{name}.jsonl").read_text().splitlines()]
        for name in counts
    }
    plain = {record["text"] for record in records[samples.FUNCTIONS]}
    assert len(plain) == counts[samples.FUNCTIONS] > 50
    used = {record["prompt"] + record["completion"] for record in records["completion"]}
    used |= {record["input"] for record in records["function_to_usage"]}
    assert len(used) >= 18
    assert not plain & used
    assert all(text.rstrip().count("\n") >= 2 and "def " in text for text in plain)
    assert {name: len(lines) for name, lines in records.items()} == counts
    assert samples.FUNCTIONS not in samples.TASKS
