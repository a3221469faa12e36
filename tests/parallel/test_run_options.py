"""Options of a whole run, as a user gives them: logging, retained checkpoints, loading, and the end of a run."""

import pytest

from tests.made_dataset import write_dataset
from tests.parallel.run import arguments_for
from tests.ranks import reserved_ports, run_on_ranks
from tests.run_records import events, records

SMALL = "--num-layers 2 --hidden-size 32 --global-batch-size 8 --train-iters 4 --log-interval 2 --eval-interval 2"
WHOLE = (
    "--save-interval 1 --save-retain-interval 3 --log-params-norm --log-throughput --tensorboard-log-interval 1 "
    "--log-memory-to-tensorboard --log-world-size-to-tensorboard --log-validation-ppl-to-tensorboard --full-validation "
    "--manual-gc --manual-gc-interval 1"
)
# name, options, and the step before which rank 1 sends a signal to itself, or "evaluation" for within the first one
RUNS = (
    ("whole", f"{WHOLE} --save {{}}/whole", None),
    ("plain", "--save {}/plain", None),
    ("signal", "--exit-signal-handler --exit-signal SIGUSR1 --save {}/signal --load {}/signal", 2),
    ("signal", "--exit-signal-handler --exit-signal SIGUSR1 --save {}/signal --load {}/signal", None),
    ("evaluating", "--save {}/evaluating --load {}/evaluating", "evaluation"),
    ("evaluating", "--save {}/evaluating --load {}/evaluating", None),
    ("time", "--exit-duration-in-mins 0 --save {}/time", None),
    ("skip", "--skip-train --load {}/whole --save {}/skip", None),
    ("step", "--load {}/whole --ckpt-step 3 --eval-interval 3 --save {}/step", None),
    ("tuned", "--pretrained-checkpoint {}/whole --load {}/tuned --save {}/tuned --train-iters 1 --seed 3", None),
    ("tuned", "--pretrained-checkpoint {}/whole --load {}/tuned --save {}/tuned --train-iters 2", None),
)


def _run(prefix, runs, world_size):
    """Run all runs one after another, each as a user would start it."""
    import os
    import signal

    from mft_megatron.mcore.parallel import timeouts
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.pretrain import pretrain

    train_step, evaluate = Trainer.train_step, Trainer.evaluate
    for words, disturbed, port in runs:
        steps = [0]

        def step(self, *arguments, steps=steps, disturbed=disturbed):
            steps[0] += 1
            if steps[0] == disturbed and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
            return train_step(self, *arguments)

        def interrupted(self, *arguments, disturbed=disturbed):
            if disturbed == "evaluation" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, *arguments)

        Trainer.train_step, Trainer.evaluate = step, interrupted
        os.environ["MASTER_PORT"] = str(port)
        ending = pretrain(arguments_for(prefix, f"{SMALL} {words}", world_size), os.environ["RANK"] == "0")
        assert ending.hurried == (disturbed is not None)
        assert (ending.left is not None) == ("--exit-duration" in words or disturbed is not None)
        # a hang of a later step ends the run after minutes, one of the start after an hour
        assert (timeouts._current < timeouts.LONG) == ("--skip-train" not in words)
    return signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folders of two data-parallel ranks, by name of the run."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "set", 128, longest=100, tasks={"completion": 2, "write": 5})
    with reserved_ports(len(RUNS)) as ports:
        runs = [
            (words.replace("{}", str(folder)), disturbed, port)
            for (_, words, disturbed), port in zip(RUNS, ports, strict=True)
        ]
        assert run_on_ranks(2, _run, str(folder / "set"), runs, 2, timeout=300) == [True, True]
    return folder


def steps_of_events(folder):
    """Name and step of each event, without ends of epochs."""
    return [
        (record["event"], record["step"])
        for record in records(folder, "event")
        if record["event"] not in ("epoch", "warning")
    ]


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / name / "tensorboard"))
    board.Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_boards_have_every_step_and_the_file_every_log_interval(folder):
    logged = scalars(folder, "whole")
    for tag in ("train/loss", "train/tflops", "train/params_norm", "memory/resident", "world-size"):
        assert logged[tag] == [1, 2, 3, 4], tag
    assert logged["valid-perplexity/write"] == logged["valid/loss"] == [2, 4]
    assert [record["step"] for record in records(folder / "whole", "train")] == [2, 4]
    logged = scalars(folder, "plain")
    assert logged["train/loss"] == logged["valid/loss"] == [2, 4]
    assert not {tag for tag in logged if "perplexity" in tag or "memory" in tag or "params" in tag}
    assert "world-size" not in logged


def test_what_is_logged_changes_no_number(folder):
    extra = {"params_norm", "tflops"}
    clocks = {"step_time", "balance_time", "balance_share"}
    with_extra, plain = records(folder / "whole", "train"), records(folder / "plain", "train")
    for record, other in zip(with_extra, plain, strict=True):
        assert extra <= record.keys()
        assert not extra & other.keys()
        assert {k: v for k, v in record.items() if k not in extra | clocks} == {
            k: v for k, v in other.items() if k not in clocks
        }
        assert record["tflops"] > 0


def test_the_norm_of_all_weights(folder):
    from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader

    reader = TensorReader(folder / "whole" / "iter_0000004")
    names = [name for name in reader.names() if name.startswith(("embedding.", "decoder.", "output_layer."))]
    assert len(names) > 8
    norm = sum(float(reader.read(name).double().square().sum()) for name in names) ** 0.5
    assert records(folder / "whole", "train")[-1]["params_norm"] == pytest.approx(norm, rel=1e-6)


def test_only_some_checkpoints_are_retained(folder):
    assert sorted(path.name for path in (folder / "whole").glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    removed = [step for event, step in steps_of_events(folder / "whole") if event == "remove"]
    assert removed == [2, 3]  # at steps 2 and 3 iterations 1 and 2 were removed, when the next one was complete


def test_a_signal_to_one_rank_saves_and_ends_all_and_the_run_can_be_resumed(folder):
    assert steps_of_events(folder / "signal") == [("save", 2), ("exit", 2), ("load", 2), ("save", 4)]
    reasons = [record["reason"] for record in events(folder / "signal", "exit")]
    assert reasons == ["a rank got SIGUSR1"]
    last, whole = records(folder / "signal", "train")[-1], records(folder / "plain", "train")[-1]
    assert (last["step"], last["loss"], last["grad_norm"]) == (4, whole["loss"], whole["grad_norm"])


def test_an_evaluation_that_a_signal_interrupts_is_made_by_the_job_that_resumes(folder):
    steps = steps_of_events(folder / "evaluating")
    assert steps == [("save", 2), ("exit", 2), ("load", 2), ("save", 4)]
    assert records(folder / "evaluating", "valid") == records(folder / "plain", "valid")
    last, whole = records(folder / "evaluating", "train")[-1], records(folder / "plain", "train")[-1]
    assert (last["step"], last["loss"], last["grad_norm"]) == (4, whole["loss"], whole["grad_norm"])


def test_a_run_ends_at_its_time_limit(folder):
    assert steps_of_events(folder / "time") == [("save", 1), ("exit", 1)]


def test_skipping_training_evaluates_once(folder):
    (valid,) = records(folder / "skip", "valid")
    assert valid == records(folder / "whole", "valid")[-1]
    assert records(folder / "skip", "train") == []
    assert not list((folder / "skip").glob("iter_*"))


def test_an_earlier_step_is_loaded(folder):
    assert steps_of_events(folder / "step")[0] == ("load", 3)
    last, whole = records(folder / "step", "train")[-1], records(folder / "plain", "train")[-1]
    assert (last["step"], last["loss"]) == (4, whole["loss"])


def test_a_run_ends_with_an_evaluation_whatever_its_interval(folder):
    assert [record["step"] for record in records(folder / "step", "valid")] == [4]


def test_a_pretrained_checkpoint_gives_weights_until_there_is_one_to_resume(folder):
    loads = events(folder / "tuned", "load")
    assert [(load["finetune"], load["step"]) for load in loads] == [(True, 0), (False, 1)]
    assert loads[0]["path"].endswith("whole/iter_0000004")
    assert loads[1]["path"].endswith("tuned/iter_0000001")
    assert [record["step"] for record in records(folder / "tuned", "train")] == [1, 2]
    first = records(folder / "tuned", "train")[0]
    assert first["loss"] < records(folder / "plain", "train")[0]["loss"]
