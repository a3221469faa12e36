"""examples/mft_vs_mixed: what it reads out of runs, what it makes of them, and that its commands are accepted.

No training: the runs are made by hand.
"""

import importlib.util
import itertools
import json
import multiprocessing
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointInfo, write_info
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
    import measurements
    import methods
    import report
    import results
    import samples
    import trainings

    command = _load("run")
finally:
    sys.path.remove(str(EXAMPLE))

SMALL, LARGE, UNSEEN = samples.RAREST, "completion", samples.UNSEEN
SEEDS = (1, 2, 3)


def evaluation(step, small, large, **others):
    """10 tokens of the small task and 90 of the large one, at the end of a step; the run's summaries are not read."""
    losses = {LARGE: (large, 90), SMALL: (small, 10)} | {name: (loss, 5) for name, loss in others.items()}
    return {
        "kind": "valid",
        "step": step,
        "loss": 99.0,
        "token_loss": 99.0,
        "macro_loss": 99.0,
        "tasks": {name: {"loss": loss, "supervised_tokens": tokens} for name, (loss, tokens) in losses.items()},
    }


def step_record(step, weights, shares, balance_share=0.0, run_shares=(0.5, 0.5), grad_norm=0.5):
    tasks = {
        name: {"weight": weight, "share": share, "run_share": run_share, "supervised_tokens": 0 if share is None else 3}
        for name, weight, share, run_share in zip((LARGE, SMALL), weights, shares, run_shares, strict=True)
    }
    return {"kind": "train", "step": step, "balance_share": balance_share, "grad_norm": grad_norm, "tasks": tasks}


def without_loss(record, name):
    return {**record, "tasks": {**record["tasks"], name: {"loss": None, "supervised_tokens": 0}}}


def write_metrics(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_probe(folder, small, large):
    """On the training samples a little better than on others; 9 on the unseen task."""
    load = {"kind": "event", "event": "load", "step": 0}
    probe = evaluation(0, small - 0.5, large - 0.25, **{UNSEEN: 9.0})
    return write_metrics(folder / "probe" / "metrics.jsonl", [load, probe])


def run_by_hand(folder, small, large):
    """Twenty steps, two evaluations, a probe."""
    steps = [step_record(step, (3.0, 1.0), (0.75, 0.25), 0.2) for step in range(1, 18)]
    steps += [
        step_record(18, (3.0, 1.0), (1.0, None), 0.2, grad_norm=1.5),  # the small task was absent
        step_record(19, (1.0, 1.0), (0.5, 0.5), 0.2, grad_norm=1.5),
        step_record(20, (1.0, 3.0), (0.25, 0.75), 0.2, run_shares=(0.6, 0.4)),
    ]
    evaluations = [
        evaluation(0, 0.1, 0.1),  # CoBa's, before the first step
        evaluation(10, 9.0, 9.0),
        evaluation(20, small, large),
    ]
    event = {"kind": "event", "event": "save", "step": 20}
    path = write_metrics(folder / "metrics.jsonl", [*evaluations[:1], *steps, *evaluations[1:], event])
    return measurements.read_run(path, write_probe(folder, small, large), UNSEEN, SMALL)


@pytest.fixture
def comparison(tmp_path):
    """All methods with the same runs, but for three.

    ``epoch`` is above ``global`` by 0.10, 0.11 and 0.12, seed by seed: clear, though the seeds lie further apart.
    ``famo`` is below by 0.4, 0 and 0.5: not clear. One model a task is better by 1 on the large task.
    """
    small, large = (3.0, 4.0, 5.0), (2.0, 2.5, 3.0)
    changes = {"epoch": (0.10, 0.11, 0.12), "famo": (-0.4, 0.0, -0.5)}
    runs = {}
    for method in methods.METHODS:
        runs[method] = []
        for i, seed in enumerate(SEEDS):
            value = small[i] + changes.get(method, (0, 0, 0))[i]
            runs[method].append(run_by_hand(tmp_path / f"{method}-{seed}", value, large[i]))
    singles = []
    for i in range(3):
        paths = {
            LARGE: write_metrics(tmp_path / f"large{i}", [{**evaluation(20, 0.0, large[i] - 1)}]),
            SMALL: write_metrics(tmp_path / f"small{i}", [{**evaluation(20, small[i], 0.0)}]),
        }
        singles.append(measurements.read_single(paths))
    base = [measurements.read_probe(write_probe(tmp_path / "base", 8.5, 8.25), UNSEEN, SMALL)] * 3
    return results.Comparison(runs, {methods.ONE_MODEL_A_TASK: singles, methods.BASE_MODEL: base})


def test_a_run_is_read(tmp_path):
    run = run_by_hand(tmp_path, small=3.0, large=2.0)
    assert run.tasks == (LARGE, SMALL)
    assert run.eval_step_E.tolist() == [10, 20]
    assert run.columns() == {
        LARGE: 2.0,
        SMALL: 3.0,
        "macro": 2.5,
        "by tokens": pytest.approx(2.1),
        "worst task": 3.0,
        "train macro": pytest.approx((2.5 + 1.75) / 2),
        "train rarest": 2.5,
        "unseen task": 9.0,
    }
    assert run.weight_TK[0].tolist() == [0.75, 0.25]
    assert run.share_TK[17].tolist() == [1.0, 0.0]
    assert run.present_TK[17].tolist() == [True, False]
    assert run.run_share_K.tolist() == [0.6, 0.4]
    assert np.flatnonzero(run.clipped_T).tolist() == [17, 18]
    assert run.balance_share == pytest.approx(0.2)


STEP = step_record(1, (1, 1), (0.5, 0.5))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (None, "not there"),
        ([], "no evaluation"),
        ([STEP, evaluation(0, 1.0, 1.0)], "no evaluation"),
        ([evaluation(1, 1.0, 1.0)], "no logged step"),
        ([STEP, without_loss(evaluation(1, 1.0, 1.0), SMALL)], f"no validation loss of {SMALL}"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(tmp_path, records, reason):
    path, probe = tmp_path / "metrics.jsonl", write_probe(tmp_path, 1.0, 1.0)
    if records is not None:
        write_metrics(path, records)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: {reason}"):
        measurements.read_run(path, probe, UNSEEN, SMALL)


def test_half_a_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "st')
    with pytest.raises(InputError, match="not JSON"):
        measurements.read_run(path, path, UNSEEN, SMALL)


def test_spread_and_paired_differences(comparison):
    assert comparison.spread("mixture", SMALL) == results.Spread(4.0, 1.0)
    difference = comparison.paired("epoch", "global", SMALL)
    assert difference.mean == pytest.approx(0.11)
    assert difference.standard_error == pytest.approx(0.01 / 3**0.5)
    assert difference.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert difference.is_clear
    unclear = comparison.paired("famo", "global", SMALL)
    assert unclear.mean == pytest.approx(-0.3)
    assert not unclear.is_clear
    assert not comparison.paired("mixture", "global", LARGE).is_clear  # no difference at all
    assert comparison.paired("epoch", "global", "train macro").mean == pytest.approx(0.055)


def test_one_model_a_task_and_the_base(comparison):
    single, base = methods.ONE_MODEL_A_TASK, methods.BASE_MODEL
    assert comparison.values(single, LARGE) == [1.0, 1.5, 2.0]
    assert comparison.values(single, SMALL) == [3.0, 4.0, 5.0]
    assert comparison.values(single, "by tokens") == pytest.approx([1.2, 1.75, 2.3])
    assert not comparison.has(single, "unseen task")
    assert comparison.values(base, "unseen task") == [9.0] * 3
    assert comparison.values(base, "train macro") == [8.0] * 3
    assert not comparison.has(base, "macro")


def test_one_seed_has_no_spread(comparison):
    one = results.Comparison(
        {method: runs[:1] for method, runs in comparison.runs.items()},
        {name: columns[:1] for name, columns in comparison.models.items()},
    )
    assert one.spread("mixture", SMALL) == results.Spread(3.0, None)
    assert one.paired("epoch", "mixture", SMALL) == results.Difference(pytest.approx(0.1), None, None)
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


def test_shares_presence_and_weights(comparison):
    assert comparison.mean_share("mixture") == pytest.approx(
        {LARGE: (17 * 0.75 + 1.0 + 0.5 + 0.25) / 20, SMALL: (17 * 0.25 + 0.5 + 0.75) / 20}
    )
    assert comparison.run_share("mixture") == pytest.approx({LARGE: 0.6, SMALL: 0.4})
    assert comparison.presence("mixture") == pytest.approx({LARGE: 1.0, SMALL: 0.95})
    assert comparison.last_weight("coba") == pytest.approx({LARGE: (0.5 + 0.25) / 2, SMALL: (0.5 + 0.75) / 2})
    assert comparison.clipped("epoch", SMALL, present=True) == pytest.approx(1 / 19)
    assert comparison.clipped("epoch", SMALL, present=False) == 1.0
    assert np.isnan(comparison.clipped("epoch", LARGE, present=False))


def rows_of(text, table):
    """The cells of a table, by the name of the row; tables count from 0."""
    lines = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")][table]
    return {
        cells[0].strip("`"): cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    }


def test_the_table(comparison):
    text = report.table(comparison, SEEDS, 20)
    tables = [rows_of(text, number) for number in range(2 + len(methods.COMPARED) + 6)]
    epoch, final, *compared = tables[: 2 + len(methods.COMPARED)]
    probed, unseen, clipped, presence, share, weight = tables[2 + len(methods.COMPARED) :]
    assert epoch[""] == ["train macro", "macro", "train rarest", SMALL, "by tokens", "unseen task"]
    assert epoch["epoch"][2] == "**+0.110 ± 0.006** [+0.085, +0.135]"
    assert epoch["small epoch"][2] == "+0.000 ± 0.000 [+0.000, +0.000]"
    assert final[""] == [LARGE, SMALL, "macro", "by tokens", "worst task"]
    assert final["mixture"] == ["2.500 ± 0.500", "4.000 ± 1.000", "3.250 ± 0.750", "2.650 ± 0.550", "4.000 ± 1.000"]
    assert final[methods.ONE_MODEL_A_TASK][0] == "1.500 ± 0.500"
    mixture, of_global, sample, single = compared
    assert mixture["epoch"][:2] == ["+0.000 ± 0.000", "**+0.110 ± 0.006**"]
    assert of_global["famo"][1] == "-0.300 ± 0.153"
    assert set(sample) == {"", "---", "focal-sample", "focal-detached"}
    assert single["global"][0] == "**+1.000 ± 0.000**"
    assert probed[methods.BASE_MODEL] == ["8.000 ± 0.000", "8.000 ± 0.000", "9.000 ± 0.000"]
    assert unseen[methods.BASE_MODEL] == ["–", "+0.000 ± 0.000"]
    assert "scratch epoch" not in unseen
    assert clipped["scratch epoch"] == ["5.3%", "100.0%"]
    assert presence["small global"] == ["100.0%", "95.0%"]
    assert share["epoch"] == ["72.5% / 60.0%", "27.5% / 40.0%"]
    assert weight["famo"] == ["37.5%", "62.5%", "20.0%"]


def test_the_json_has_every_number(comparison):
    content = json.loads(json.dumps(report.as_json(comparison, SEEDS, {"iterations": 20})))
    assert set(content["methods"]) == {*methods.METHODS, methods.ONE_MODEL_A_TASK, methods.BASE_MODEL}
    epoch = content["methods"]["epoch"]
    assert epoch["runs"]["3"][-1][SMALL] == pytest.approx(5.12)
    assert epoch["of seeds"]["3"]["train rarest"] == pytest.approx(4.62)
    assert epoch["final"][SMALL] == {"mean": pytest.approx(4.11), "std": pytest.approx(1.01)}
    assert epoch["minus global"][SMALL]["mean"] == pytest.approx(statistics.fmean((0.1, 0.11, 0.12)))
    assert "minus global" in content["methods"]["coba"]
    assert "train macro" not in epoch["minus one model a task"]
    assert content["methods"]["base"]["final"]["unseen task"] == {"mean": 9.0, "std": 0.0}


def test_the_plot(comparison, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from figures import plot

    plot(comparison, tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 20_000 < len(content) < 200_000


EXPECTED = {
    "mixture": ("token", "global", "static"),
    "micro-batch": ("task-token", "micro-batch", "static"),
    "global": ("task-token", "global", "static"),
    "epoch": ("task-token", "epoch", "static"),
    "sample global": ("task-sample", "global", "static"),
    "sample epoch": ("task-sample", "epoch", "static"),
    "focal-sample": ("focal-sample", "global", "static"),
    "focal-detached": ("focal-sample", "global", "static"),
    "self-paced": ("task-token", "global", "self-paced"),
    "famo": ("task-token", "global", "famo"),
    "coba": ("task-token", "global", "coba"),
    "small global": ("task-token", "global", "static"),
    "small epoch": ("task-token", "epoch", "static"),
    "scratch global": ("task-token", "global", "static"),
    "scratch epoch": ("task-token", "epoch", "static"),
    "small scratch global": ("task-token", "global", "static"),
    "small scratch epoch": ("task-token", "epoch", "static"),
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_a_command_that_is_accepted(name, tmp_path):
    method = methods.METHODS[name]
    words = methods.method_words(method, tmp_path / "data", tmp_path / "save", 3, 100, None)
    assert "--mft-normalization" in words  # its default is not the same for all runs
    arguments = parse_arguments(words)
    chosen = arguments.multi_task
    assert (chosen.mft_loss, chosen.mft_normalization, chosen.task_balance) == EXPECTED[name]
    assert chosen.focal_detach == (name == "focal-detached")
    assert arguments.initialization.seed == 3
    assert arguments.regularization.clip_grad == measurements.CLIP_GRAD
    # besides the objective, nothing differs between methods; small steps read as many rows as large ones
    reference = methods.METHODS["small global" if name.startswith("small") else "mixture"]
    same = parse_arguments(methods.method_words(reference, tmp_path / "data", tmp_path / "save", 3, 100, None))
    for group in ("network", "regularization", "initialization", "learning_rate", "validation", "data", "logging"):
        assert getattr(arguments, group) == getattr(same, group)
    training, rows = arguments.training, 6 if name.startswith("small") else 24
    assert (training.train_iters * training.global_batch_size, training.global_batch_size) == (2400, rows)
    assert training.micro_batch_size == (1 if name == "micro-batch" else rows)
    assert arguments.validation.eval_interval * methods.EVALUATIONS == training.train_iters


def test_epoch_differs_from_global_in_one_word():
    for method, other in methods.EPOCH_AGAINST.items():
        words, others = ([*methods.METHODS[name].options.split()] for name in (method, other))
        assert [pair for pair in zip(words, others, strict=True) if len(set(pair)) > 1] == [("epoch", "global")]
        assert methods.METHODS[method].rows == methods.METHODS[other].rows
        assert methods.METHODS[method].from_base == methods.METHODS[other].from_base


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
    coba = methods.METHODS["coba"]
    words = methods.method_words(coba, tmp_path / "data", tmp_path / "save", 3, 100, tmp_path / "base")
    arguments = parse_arguments(words)
    assert arguments.resume.path == folder
    assert arguments.checkpoint.finetune
    probe = parse_arguments(methods.probe_words(tmp_path / "probe", tmp_path / "base", tmp_path / "save"))
    assert probe.resume.path == folder
    assert probe.validation.skip_train
    assert probe.validation.eval_iters is None  # all of it
    assert probe.data.data_path == str(tmp_path / "probe")


def test_the_shortest_run_is_accepted(tmp_path):
    words = methods.method_words(
        methods.METHODS["mixture"], tmp_path / "data", tmp_path / "save", 1, methods.SHORTEST, None
    )
    assert parse_arguments(words).validation.eval_interval >= 1


@pytest.mark.smoke
def test_all_runs_are_planned(tmp_path):
    prefixes = {name: tmp_path / name for name in command.DATA}
    for name in prefixes:
        (tmp_path / f"{name}_dataset.json").write_text(name)
    plan = command.plan(tmp_path, prefixes, [1, 2], 100, 200)
    assert list(plan.bases) == [1, 2]
    assert list(plan.runs) == [(method, seed) for seed in (1, 2) for method in methods.METHODS]
    assert len(plan.singles) == 2 * len(samples.TASK_NAMES)
    assert set(plan.probes) == {(name, seed) for seed in (1, 2) for name in (*methods.METHODS, "base")}
    bases, trained, probes = plan.stages()
    assert len({run.folder for stage in plan.stages() for run in stage}) == len(bases + trained + probes)
    for (method, seed), run in plan.runs.items():
        loads = run.command[run.command.index("--load") + 1] if "--load" in run.command else None
        assert loads == (str(plan.bases[seed].save) if methods.METHODS[method].from_base else None)
        assert str(run.save) in plan.probes[method, seed].command
    for (_, task), run in plan.singles.items():
        assert run.command[run.command.index("--data-path") + 1] == str(prefixes[task])
    # a run depends on its base and on its data, and its probe depends on all of that
    longer = command.plan(tmp_path, prefixes, [1, 2], 100, 201)
    assert longer.runs["mixture", 1].command == plan.runs["mixture", 1].command
    assert longer.runs["mixture", 1].receipt != plan.runs["mixture", 1].receipt
    assert longer.probes["mixture", 1].receipt != plan.probes["mixture", 1].receipt
    (tmp_path / "tasks_dataset.json").write_text("others")
    others = command.plan(tmp_path, prefixes, [1, 2], 100, 200)
    assert others.runs["mixture", 1].receipt != plan.runs["mixture", 1].receipt
    assert others.singles[1, "fim"].receipt == plan.singles[1, "fim"].receipt
    from_scratch = command.plan(tmp_path, prefixes, [1], 100, 0)
    assert not from_scratch.bases
    assert "--load" not in from_scratch.runs["mixture", 1].command
    assert set(from_scratch.probes) == {(name, 1) for name in methods.METHODS}


def training(folder, name, code, inputs=""):
    script = folder / f"{name}.py"
    script.write_text(code)
    return trainings.Training(name, (sys.executable, str(script), "word"), folder / name, inputs)


@pytest.fixture
def processes(monkeypatch):
    """Forked processes find the example's modules, and need not wait for torch."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setattr(trainings, "PROCESSES", multiprocessing.get_context("spawn"))


def test_a_complete_run_is_not_repeated(tmp_path, processes):
    counter, said = tmp_path / "counter", []
    code = f"import sys; open({str(counter)!r}, 'a').write('x'); print(sys.argv[1:], sum(range(3_000_000)))"
    run = training(tmp_path, "token", code)
    assert not run.is_complete()
    for _ in range(2):
        trainings.run_all([run], 2, tmp_path, said.append)
    assert counter.read_text() == "x"
    assert "['word'] " in run.log.read_text()
    assert 0.01 < run.cpu_seconds() < 10
    assert "1 of 1 runs are complete already" in said[-1]
    trainings.run_all([training(tmp_path, "token", code, inputs="other data")], 2, tmp_path, said.append)
    assert counter.read_text() == "xx"
    (tmp_path / "token" / "done.json").write_text("{")
    trainings.run_all([run], 2, tmp_path, said.append)
    assert counter.read_text() == "xxx"


def test_a_failed_run_names_its_log_and_ends_the_example(tmp_path, processes):
    failing = training(tmp_path, "famo, seed 2", "print('first\\nerror: no memory\\nlast'); exit(1)")
    later = training(tmp_path, "coba, seed 2", "")
    with pytest.raises(InputError) as error:
        trainings.run_all([failing, later], 1, tmp_path, str)
    log = tmp_path / "famo, seed 2" / "log.txt"
    assert str(error.value) == f"famo, seed 2 ended with exit code 1: no memory; see {log}"
    assert "first\n" in log.read_text()
    assert not failing.is_complete()
    assert not later.is_complete()


def test_a_run_that_dies_shows_its_last_line(tmp_path, processes):
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


@pytest.fixture(scope="module")
def small_library(tmp_path_factory):
    library = tmp_path_factory.mktemp("library")
    for module in ("argparse", "textwrap", "statistics", "tarfile"):
        (library / f"{module}.py").write_text(Path(importlib.util.find_spec(module).origin).read_text())
    return library


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_base_learns_from_functions_that_no_task_has(tmp_path, small_library):
    """Module by module of a small library: a function is either in one task or plain text."""
    counts = samples.write_samples(tmp_path, small_library, scale=0.01)
    assert set(counts) == {*samples.TASK_NAMES, samples.UNSEEN, samples.FUNCTIONS}
    assert (counts["completion"], counts["fim"], counts[samples.UNSEEN]) == (18, 10, 3)
    records = {name: read_records(tmp_path / f"{name}.jsonl") for name in counts}
    plain = {record["text"] for record in records[samples.FUNCTIONS]}
    assert len(plain) == counts[samples.FUNCTIONS] > 50
    used = {record["prompt"] + record["completion"] for record in records["completion"]}
    used |= {record["input"] for record in records["function_to_usage"]}
    for record in records[samples.UNSEEN]:
        request, answer = (turn["content"] for turn in record["messages"])
        body, signature = (text.split("```python\n")[1].removesuffix("```") for text in (request, answer))
        used.add(signature + body)
    assert len(used) >= 21
    assert not plain & used
    assert all(text.rstrip().count("\n") >= 2 and "def " in text for text in plain)
    assert {name: len(lines) for name, lines in records.items()} == counts
    assert not {samples.FUNCTIONS, samples.UNSEEN} & set(samples.TASKS)


ROW = 160


def sample_tokens(prefix, splits):
    """Tokens of all samples in the rows of some splits, as sorted tuples."""
    dataset = PackedDataset.open(str(prefix), ROW)
    found = []
    for split in map(dataset.split, splits):
        for pack in range(split.num_packs):
            slices = split.slices_of(pack)
            batch = build_batch(dataset, [slices])
            ends = batch.cu_seqlens[: len(slices.samples) + 1].tolist()  # padding follows
            found += [tuple(batch.tokens_BS[0, a:b].tolist()) for a, b in itertools.pairwise(ends)]
    return sorted(found)


def test_the_probe_has_the_training_samples(tmp_path, small_library, tokenizer_folder):
    """Its samples are those of the training split that preprocessing makes, of which it cuts long ones."""
    samples.write_samples(tmp_path, small_library, scale=0.02)
    words = (*("--tokenizer-model", tokenizer_folder), *("--seq-length", ROW, "--overlong", "truncate"))
    for name, folder in (("tasks", tmp_path), ("probe", tmp_path / "probe")):
        split = ("--split", command.DATA[name][2], "--output-prefix", tmp_path / f"{name}_data")
        task = ("--task", f"completion={folder / 'completion.jsonl'}")
        process = run_tool("tools/preprocess_data.py", *task, *words, *split)
        assert process.returncode == 0, process.stderr
    trained = sample_tokens(tmp_path / "tasks_data", ["train"])
    assert len(trained) == 29  # 0.8 of 0.02 of 1,800
    assert sample_tokens(tmp_path / "probe_data", ["train", "valid"]) == trained
    assert len(sample_tokens(tmp_path / "probe_data", ["train"])) == 1
