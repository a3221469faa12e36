"""Bad steps on parallel layouts: a planted sample is found by name, nothing is updated, and the proof says so."""

import contextlib
import functools
import itertools
import json

import pytest

from tests.made_dataset import PLANTED, write_dataset
from tests.parallel.layouts import ParallelLayout
from tests.parallel.run import arguments_for
from tests.ranks import reserved_ports, run_on_ranks
from tests.run_records import events, records

SMALL = "--num-layers 4 --hidden-size 32 --global-batch-size 8 --train-iters 8 --log-interval 1"
PLANTED_TASK, PLANTED_SAMPLE = "write", 1


@contextlib.contextmanager
def poisoned():
    """Let the planted token have an embedding that is not a number, in every model that is built inside the block."""
    from mft_megatron.mcore.trainer import Trainer

    build = Trainer.__init__

    def spoil(module, inputs, output):
        return output.masked_fill((inputs[0] == PLANTED)[..., None], float("nan"))

    def built(self, *arguments):
        build(self, *arguments)
        for chunk in self.chunks:
            if hasattr(chunk.module, "embedding"):
                chunk.module.embedding.word_embeddings.register_forward_hook(spoil)

    Trainer.__init__ = built
    try:
        yield
    finally:
        Trainer.__init__ = build


def _run(prefix, runs, world_size):
    """Make runs one after another, each with a poisoned sample; return the error of each."""
    import os

    from mft_megatron.errors import InputError
    from mft_megatron.training.pretrain import pretrain

    errors = []
    for words, shape, port in runs:
        os.environ["MASTER_PORT"] = str(port)
        with poisoned():
            try:
                pretrain(arguments_for(prefix, f"{SMALL} {words}", world_size, shape), os.environ["RANK"] == "0")
                errors.append(None)
            except InputError as error:
                errors.append((str(error), error.code))
    return errors


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("bad_steps") / "set"
    planted = (PLANTED_TASK, PLANTED_SAMPLE)
    write_dataset(prefix, 128, longest=100, tasks={"completion": 2, PLANTED_TASK: 5}, planted=planted)
    return prefix


def index_of_planted(prefix):
    """Index in the data set of the planted sample."""
    ledger = json.loads(prefix.with_name("set_dataset.json").read_text())
    (before,) = [task["kept"] for task in ledger["tasks"] if task["name"] != PLANTED_TASK]
    return before + PLANTED_SAMPLE


SKIP = "--on-bad-step skip --train-iters 3"
BACK = "--on-bad-step rollback --save-interval 1 --train-iters 6 --attention-dropout 0.1 --hidden-dropout 0.1"
LAYOUTS, SLOW_LAYOUTS = ("DP2 overlap", "PP2 VPP2"), ("CP2", "TP2")
# name of the run: options, shape, ranks
RUNS = {
    "stop": ("--save-interval 1", "llama", 1),
    "limit": ("--on-bad-step skip --max-bad-steps 1 --global-batch-size 34", "llama", 1),
    "back": (f"{BACK} --mft-loss focal-task", "tied", 1),
    "again": ("--on-bad-step rollback --save-interval 1 --max-bad-steps 1 --global-batch-size 34", "llama", 1),
    **{layout: (f"{SKIP} {ParallelLayout(layout).options}", "deep", 2) for layout in LAYOUTS},
}
SLOW = {
    "bf16": (f"{SKIP} --bf16 --attention-dropout 0.1", "tied", 1),
    **{layout: (f"{SKIP} {ParallelLayout(layout).options}", "deep", 2) for layout in SLOW_LAYOUTS},
    "back of two": (f"{BACK} --async-save {ParallelLayout('DP2 overlap').options}", "llama", 2),
}


def _made(prefix, runs):
    """Errors of each run, by its name; their folders are beside the data set."""
    found = {}
    for world_size in (1, 2):
        names = [name for name, (_, _, ranks) in runs.items() if ranks == world_size]
        with reserved_ports(len(names)) as ports:
            given = [
                (f"--save {prefix.parent / name.replace(' ', '')} {runs[name][0]}", runs[name][1], port)
                for name, port in zip(names, ports, strict=True)
            ]
            for of_rank in run_on_ranks(world_size, _run, str(prefix), given, world_size):
                for name, error in zip(names, of_rank, strict=True):
                    found.setdefault(name, []).append(error)
    return found


@pytest.fixture(scope="module")
def errors(prefix):
    return _made(prefix, RUNS)


@pytest.mark.slow
def test_on_more_layouts_and_in_16_bits(prefix, errors):
    more = _made(prefix, SLOW)
    _check_skipped(prefix, "bf16", more["bf16"], 1)
    for layout in SLOW_LAYOUTS:
        _check_skipped(prefix, layout, more[layout], 2)
    _check_same_steps(prefix, (*LAYOUTS, *SLOW_LAYOUTS))
    _check_back(prefix, "back of two", more["back of two"], SLOW["back of two"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_planted_sample_is_found_by_name_and_its_batches_are_left_out(prefix, errors, name):
    _check_skipped(prefix, name, errors[name], 2)


def _check_skipped(prefix, name, of_ranks, world_size):
    folder, index = prefix.parent / name.replace(" ", ""), index_of_planted(prefix)
    assert of_ranks == [None] * world_size
    found = events(folder, "bad step")
    assert found
    for event in found:
        not_finite = [sample for sample in event["samples"] if sample["loss"] == "nan"]
        assert {(sample["task"], sample["sample"]) for sample in not_finite} == {(PLANTED_TASK, index)}
        assert event["slices"]["not_finite"] == len(not_finite)
        assert event["slices"]["all"] > len(not_finite)
        assert event["reason"].endswith("is nan")
        finite = [sample["loss"] for sample in event["samples"] if sample["loss"] != "nan"]
        assert finite == sorted(finite, reverse=True)
    steps = [record["step"] for record in records(folder, "train")]
    assert sorted([*steps, *(event["step"] for event in found)]) == [1, 2, 3]
    epochs = events(folder, "epoch")
    assert epochs
    assert all(event["complete"] for event in epochs)
    left_out = sum(task.get("left_out", 0) for event in epochs for task in event["tasks"].values())
    assert left_out > 0


def test_the_order_of_bad_steps_and_losses_do_not_depend_on_the_layout(prefix, errors):
    _check_same_steps(prefix, LAYOUTS)


def _check_same_steps(prefix, layouts):
    of_layouts = []
    for layout in layouts:
        folder = prefix.parent / layout.replace(" ", "")
        steps = records(folder, "train")
        of_layouts.append(([event["step"] for event in events(folder, "bad step")], [step["loss"] for step in steps]))
    for (first, losses), (second, others) in itertools.pairwise(of_layouts):
        assert first == second
        assert losses == pytest.approx(others, rel=1e-6)


def test_stopping_names_the_sample_and_the_checkpoint_to_go_on_from(prefix, errors):
    ((line, code),) = errors["stop"]
    (event,) = events(prefix.parent / "stop", "bad step")
    assert code == 11
    assert event["action"] == "the run ends"
    step = event["step"]
    assert line.startswith(f"step {step}: the loss is nan; it updated nothing. Losses of 1 of ")
    assert f"task {PLANTED_TASK} sample {index_of_planted(prefix)} in pack {event['samples'][0]['pack']} (nan)" in line
    folder = prefix.parent / "stop"
    if step == 1:
        assert line.endswith("start again with --on-bad-step skip: no checkpoint was saved before that")
    else:
        continues = f"continue from {folder}/iter_{step - 1:07d} with --load {folder} --on-bad-step skip"
        assert line.endswith(continues)


def test_a_run_that_goes_back_is_one_that_left_these_packs_out_from_the_start(prefix, errors):
    """Another run reads the list of packs when it starts, as one that was killed after going back would."""
    _check_back(prefix, "back", errors["back"], RUNS["back"])


def _check_back(prefix, name, of_ranks, run):
    words, shape, world_size = run
    folder, other = prefix.parent / name.replace(" ", ""), prefix.parent / f"{name.replace(' ', '')}-other"
    assert of_ranks == [None] * world_size
    found, back = events(folder, "bad step"), events(folder, "rollback")
    # the planted sample is in the first global batch, before any checkpoint, and once in each of the next epochs
    assert [event["action"].split("/")[0] for event in found] == [
        "its global batch is left out",
        *["the run goes back to "] * len(back),
    ]
    assert back
    for event, bad in zip(back, found[1:], strict=True):
        assert (event["from_step"], event["step"]) == (bad["step"], bad["step"] - 1)
    left_out = json.loads((folder / "left_out.json").read_text())
    assert [batch["step"] for batch in left_out] == [event["from_step"] for event in back]
    other.mkdir()
    (other / "left_out.json").write_text((folder / "left_out.json").read_text())
    with reserved_ports(1) as (port,):
        run = (f"--save {other} {words}", shape, port)
        assert run_on_ranks(world_size, _run, str(prefix), [run], world_size) == [[None]] * world_size
    assert events(other, "rollback") == []
    assert [event["step"] for event in events(other, "skip")] == [event["from_step"] for event in back]
    for kind, names in (("train", ("loss", "grad_norm", "lr")), ("valid", ("loss", "token_loss"))):
        ours, others = ({record["step"]: record for record in records(run, kind)} for run in (folder, other))
        assert ours.keys() == others.keys()
        assert [[ours[step][name] for name in names] for step in ours] == [
            [others[step][name] for name in names] for step in ours
        ]
    ours, others = ({event["epoch"]: event["tasks"] for event in events(run, "epoch")} for run in (folder, other))
    assert ours == others
    assert any("left_out" in task for tasks in ours.values() for task in tasks.values())


def test_a_run_goes_back_without_an_update_as_often_as_allowed(prefix, errors):
    """Each batch is bad: the first is skipped, there being no checkpoint, and the second left out after a rollback."""
    ((line, code),) = errors["again"]
    assert code == 11
    assert line.startswith(
        "step 3: the loss is nan, rollback 2 since a checkpoint with a new update (--max-bad-steps 1)"
    )


def test_more_bad_steps_in_a_row_than_allowed_end_the_run(prefix, errors):
    """Each global batch holds every pack twice, and so the planted sample."""
    ((line, code),) = errors["limit"]
    assert code == 11
    assert line.startswith("step 2: the loss is nan, bad step 2 in a row (--max-bad-steps 1); it updated nothing. ")
    assert "Losses of 2 of" in line
    assert "If they are bad, raise --max-bad-steps; else lower --lr" in line
    actions = [event["action"] for event in events(prefix.parent / "limit", "bad step")]
    assert actions == ["its global batch is left out", "the run ends"]


def _refuse(numbers, seen):
    numbers.append(seen)
    return "no"


def _judged(prefix, cases, world_size):
    """In each case, the second step of a model whose first one was refused, and of one that has taken no other."""
    import os

    import numpy as np
    import torch

    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from tests.parallel.run import open_dataset, plans_of

    weight_K = np.ones(2)
    found = []
    for options, shape, port in cases:
        os.environ["MASTER_PORT"] = str(port)
        arguments = arguments_for(prefix, options, world_size, shape)
        split = open_dataset(arguments).split("train")
        with process_groups.process_groups(arguments.distributed, 1):
            of_models = []
            for refused in (True, False):
                trainer = Trainer(arguments, split.dataset.vocab_size, 2)
                first, second = plans_of(split, 1, 2)
                if refused:
                    numbers = []
                    report = trainer.train_step(split, first, weight_K, functools.partial(_refuse, numbers))
                    assert (report.refused, report.updated) == ("no", False)
                    (seen,) = numbers
                    assert (seen.loss, seen.grad_norm) == (pytest.approx(report.loss, rel=1e-15), report.grad_norm)
                    assert seen.loss_K.tolist() == report.loss_K.tolist()
                report = trainer.train_step(split, second, weight_K, lambda seen: None)
                assert report.updated
                facts = (report.loss, report.grad_norm, report.learning_rate, trainer.scheduler.num_steps)
                used = [int(usage.of(0).slices_K.sum()) for usage in (trainer.usage, trainer.left_out)]
                with trainer.weights.whole():
                    state = [chunk.module.state_dict() for chunk in trainer.chunks]
                # also the biases of routers, which a step changes with its gradients
                values = {
                    (index, name): value.clone()
                    for index, chunk in enumerate(state)
                    for name, value in chunk.items()
                    if torch.is_tensor(value) and value.is_floating_point()
                }
                of_models.append((facts, used, values))
            (facts, used, values), (wanted, alone, wanted_values) = of_models
            differing = [name for name, value in values.items() if not value.equal(wanted_values[name])]
            biases = [bool(value.any()) for (_, name), value in values.items() if name.endswith("expert_bias")]
            found.append((facts, wanted, used, alone, differing, biases))
    return found


CASES = {
    1: (
        ("--fp16 --initial-loss-scale 1024", "llama"),
        ("--mft-loss focal-task --optimizer sgd", "tied"),
        ("--moe-router-enable-expert-bias --moe-router-score-function sigmoid", "experts"),
    ),
    2: (
        ("--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", "llama"),
        ("--expert-model-parallel-size 2 --use-distributed-optimizer", "experts"),
        ("--pipeline-model-parallel-size 2", "tied"),
    ),
}


@pytest.mark.parametrize("world_size", CASES)
def test_a_refused_step_leaves_no_trace_but_the_count_of_what_it_left_out(prefix, world_size):
    with reserved_ports(len(CASES[world_size])) as ports:
        cases = [(*case, port) for case, port in zip(CASES[world_size], ports, strict=True)]
        for found in run_on_ranks(world_size, _judged, str(prefix), cases, world_size):
            for (options, *_), (facts, wanted, used, alone, differing, biases) in zip(cases, found, strict=True):
                assert facts == wanted
                assert differing == []
                assert (bool(biases) and all(biases)) == ("expert-bias" in options)
                assert used[0] == alone[0]
                assert used[1] > alone[1] == 0


def _gone_back(prefix, folder, cases):
    """In each case, a step after a load of a checkpoint from before the first update, and the same of another model."""
    import os

    import numpy as np

    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo
    from tests.parallel.run import open_dataset, plans_of

    found = []
    for number, (options, port) in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port)
        arguments = arguments_for(prefix, options, 1)
        split = open_dataset(arguments).split("train")
        with process_groups.process_groups(arguments.distributed, 1):
            first, second = plans_of(split, 1, 2)
            of_models = []
            for goes_back in (True, False):
                trainer = Trainer(arguments, split.dataset.vocab_size, 2)
                if goes_back:
                    info = CheckpointInfo(1, 8, {}, 1, {}, "", 1, 8, layout=process_groups.parallel_layout())
                    path = checkpoint.save(folder / str(number), trainer, info, arguments.checkpoint)
                    trainer.train_step(split, first, np.ones(2))
                    trainer.forget_progress()
                    checkpoint.load(path, trainer, info, arguments.checkpoint)
                reports = [trainer.train_step(split, second, np.ones(2)) for _ in range(3)]
                of_models.append([(report.loss, report.grad_norm, report.learning_rate) for report in reports])
            found.append(of_models)
    return found


def test_going_back_to_before_the_first_update_forgets_the_optimizer_states(prefix, tmp_path):
    """An fp16 run has such checkpoints: its first steps overflow until the loss scale is small enough."""
    options = ("", "--fp16 --initial-loss-scale 1024", "--bf16 --use-distributed-optimizer", "--optimizer sgd")
    with reserved_ports(len(options)) as ports:
        cases = list(zip(options, ports, strict=True))
        (found,) = run_on_ranks(1, _gone_back, str(prefix), tmp_path, cases)
    assert [back == alone for back, alone in found] == [True] * len(options)


@pytest.fixture(scope="module")
def garbled(tmp_path_factory):
    """A data set with a sample of random bytes, and the errors of runs that train on it."""
    folder = tmp_path_factory.mktemp("garbled")
    write_dataset(folder / "set", 128, longest=100, tasks={"completion": 1, "write": 2}, garbled=("write", 1))
    spikes = "--on-bad-step skip --loss-spike-factor 6 --loss-spike-window 16 --lr 1e-2 --global-batch-size 4"
    spikes = f"{spikes} --train-iters 30 --eval-interval 100"
    lost = "--eval-interval 100 --save-interval 1"
    words = [
        f"--save {folder}/whole {spikes}",
        f"--save {folder}/resumed --exit-interval 20 {spikes}",
        f"--save {folder}/resumed --load {folder}/resumed {spikes}",
        f"--save {folder}/lost --train-iters 2 {lost}",
        f"--save {folder}/lost --load {folder}/lost --train-iters 6 --lr 1e30 --clip-grad 0 {lost}",
        f"--save {folder}/dead --train-iters 6 --lr 1e30 --clip-grad 0 --on-bad-step skip --max-bad-steps 2 {lost}",
    ]
    with reserved_ports(len(words)) as ports:
        runs = [(each, "llama", port) for each, port in zip(words, ports, strict=True)]
        (errors,) = run_on_ranks(1, _run, str(folder / "set"), runs, 1)
    return folder, errors


def test_a_loss_that_jumps_names_the_garbled_sample_also_after_a_resume(garbled):
    folder, errors = garbled
    assert errors[:3] == [None] * 3
    found = events(folder / "whole", "bad step")
    assert found
    kept = json.loads((folder / "set_dataset.json").read_text())["tasks"][0]["kept"]
    for event in found:
        assert event["reason"].startswith("the loss of task write is 5.")
        assert event["samples"][0]["sample"] == kept + 1
        assert event["slices"]["not_finite"] == 0
    # the windows are part of the checkpoint
    assert max(event["step"] for event in found) > 20
    assert events(folder / "resumed", "bad step") == found


def test_the_advice_names_the_last_checkpoint_whose_weights_had_a_finite_step(garbled):
    folder, errors = garbled
    line, code = errors[4]
    assert code == 11
    assert line.startswith(
        "step 4: the gradient norm is nan; it updated nothing. Every sample of the batch has a finite"
    )
    assert (folder / "lost" / "iter_0000003").is_dir()
    advice = f"continue from {folder}/lost/iter_0000002 with --load {folder}/lost --ckpt-step 2"
    assert f"{advice}, since later ones have the weights that diverged" in line


def test_weights_that_are_to_blame_for_bad_steps_are_not_saved(garbled):
    """Their checkpoints would push good ones out of --keep-last."""
    folder, errors = garbled
    line, code = errors[5]
    assert code == 11
    assert "bad step 3 in a row" in line
    assert [event["step"] for event in events(folder / "dead", "bad step")] == [2, 3, 4]
    assert sorted(path.name for path in (folder / "dead").glob("iter_*")) == ["iter_0000001"]
