"""Checkpoints that a run keeps, also when it is interrupted; and the tokenizer's files in its folder."""

import dataclasses
import errno
import functools
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import FAILED, STORAGE
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.checkpointing.writers.agreement import SaveError
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.run_folder.description import read_info, write_info
from mft_megatron.run_folder.found import best_checkpoint, latest_checkpoint
from mft_megatron.run_folder.names import INFO, TRACKER, iteration_folder
from mft_megatron.run_folder.publishing import remove_leftovers, set_aside
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.retention import record_best
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving import description, saver
from mft_megatron.training.saving.attempts import LAST_WAITS, MOST_FAILURES, Attempts
from mft_megatron.training.saving.kept_files import keep_tokenizer
from mft_megatron.training.saving.removal import Removal
from mft_megatron.training.saving.resume import agree_on_start, restore_tracker, resume
from mft_megatron.training.saving.saver import Saver
from mft_megatron.training.saving.sources import Sources
from tests.descriptions import description_of
from tests.full_disk import largest_file


@pytest.fixture
def kept(tmp_path, capsys):
    def keep(model):
        keep_tokenizer(tmp_path / "run", str(model), RunLog(True))
        folder = tmp_path / "run" / "tokenizer"
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        return names, capsys.readouterr().out

    return keep


def test_a_folder_is_copied_again_and_again(kept, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert kept(tmp_path / "hf") == (["tokenizer.json"], "")
    (tmp_path / "hf" / "merges.txt").write_text("")
    assert kept(tmp_path / "hf") == (["merges.txt", "tokenizer.json"], "")


def test_of_a_model_folder_only_the_tokenizer_is_copied(kept, tmp_path):
    (tmp_path / "hf").mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "model.safetensors",
        "generation_config.json",
    ):
        (tmp_path / "hf" / name).write_text("{}")
    assert kept(tmp_path / "hf")[0] == ["tokenizer.json", "tokenizer_config.json"]


def test_of_a_file_the_files_beside_it_are_copied_too(kept, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    assert kept(tmp_path / "tokenizer.json")[0] == ["tokenizer.json", "tokenizer_config.json"]


def test_a_sentencepiece_model_gets_the_name_transformers_looks_for(kept, tmp_path):
    (tmp_path / "code.model").write_bytes(b"m")
    assert kept(tmp_path / "code.model") == (["tokenizer.model"], "")


def test_a_tokenizer_that_is_gone_is_named(kept, tmp_path):
    names, said = kept(tmp_path / "gone")
    assert names == []
    assert "gone is gone: an export of this run will need --tokenizer-model" in said


class Killed(BaseException):
    """The job is ended from outside."""


def fake_load(path, trainer, info, options):
    """Return what :func:`mft_megatron.mcore.checkpointing.checkpoint.load` returns."""
    return {} if options.finetune else json.loads((path / "weights").read_text())


def fake_save(writer, folder, trainer, info, state, when_complete):
    """Change the run folder as :meth:`mft_megatron.mcore.checkpointing.checkpoint.Writer.save` does."""
    path = iteration_folder(folder, info.iteration)
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text(json.dumps(state))
    write_info(path, info)
    replace_text(folder / TRACKER, f"{info.iteration}\n")
    when_complete()


class Job:
    """A run in ``folder`` without a model, which only saves."""

    def __init__(self, prefix, folder, words=""):
        self.folder = folder
        words = f"--num-layers 2 --hidden-size 32 --num-attention-heads 2 --train-iters 1000 --lr 1 {words}"
        words += f" --micro-batch-size 1 --seq-length 128 --data-path {prefix} --save {folder} --load {folder}"
        self.arguments = parse_arguments(words.split())
        self.saver = Saver(self.arguments, PackedDataset.open(prefix, 128))
        self.log = RunLog(True)
        self.best_step = None

    def resume(self):
        progress, state = resume(self.arguments, None, self.log)
        self.best_step = state["stopping"]["run"]["step"] if state else None
        return progress.step

    def step(self, step, best=False, ending=False):
        self.best_step = step if best else self.best_step
        if self.saver.due(step, ending, best):
            state = {"stopping": {"run": {"step": self.best_step}}}
            self.saver.save(None, Progress(step, step), self.log, ending, best, state)
        return self.kept()

    def kept(self):
        """Iterations of the complete checkpoints."""
        return [read_info(path.parent).iteration for path in sorted(self.folder.glob(f"iter_*/{INFO}"))]

    def best(self):
        return best_checkpoint(self.folder).info.iteration


@pytest.fixture
def job(dataset_prefix, tmp_path, monkeypatch):
    """Start a job, or start it again; all have the same run folder."""
    monkeypatch.setattr(checkpoint.Writer, "save", fake_save)
    monkeypatch.setattr(Removal, "_remove", lambda removal: None)  # in a thread
    monkeypatch.setattr(checkpoint, "load", fake_load)
    monkeypatch.setattr(process_groups, "parallel_layout", dict)
    monkeypatch.setattr(process_groups, "is_main", lambda: True)
    monkeypatch.setattr(process_groups, "any_rank", bool)
    monkeypatch.setattr(process_groups, "of_all_ranks", lambda value: [value])
    return lambda words="": Job(dataset_prefix, tmp_path / "run", words)


def test_the_best_checkpoint_stays_until_a_better_one_is_there(job, capsys):
    run = job()
    assert run.step(10, best=True) == [10]
    assert run.step(20) == [10]
    assert run.step(30, best=True) == [30]
    assert run.step(40, ending=True) == [30, 40]
    assert (run.best(), latest_checkpoint(run.folder).info.iteration) == (30, 40)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines] == ["save", "save", "remove", "save"]
    assert "step 30 | remove | path" in lines[2]
    assert "iter_0000010 | reason no longer the best checkpoint" in lines[2]
    assert lines[1].endswith("best True")
    assert "best True" not in lines[3]


def test_a_checkpoint_says_what_its_data_were_trained_with(job):
    """An export writes the template and the stop tokens that are recorded here."""
    run = job()
    ledger = run.saver._describer._dataset.ledger
    first, second = (task.name for task in ledger.tasks[:2])
    sources = [
        {"name": "chatml", "source": "{{ c }}", "tasks": [first]},
        {"name": "own", "source": "{{ o }}", "tasks": [second]},
    ]
    run.saver._describer._dataset.ledger = dataclasses.replace(
        ledger,
        tasks=[dataclasses.replace(task, chats=number) for number, task in enumerate(ledger.tasks)],
        chat_template={"name": "chatml", "fingerprint": "0", "stop_token_ids": [5, 9], "sources": sources},
    )
    run.step(10, ending=True)
    recorded = latest_checkpoint(run.folder).info.tokenizer
    assert recorded["stop_token_ids"] == [5, 9]
    assert recorded["chat_template"] == {"name": "own", "source": "{{ o }}", "others": {"chatml": [first]}}


def test_what_was_asked_for_is_never_removed(job):
    run = job("--save-interval 20")
    for step, expected in ((10, [10]), (20, [20]), (30, [20, 30]), (40, [20, 30, 40]), (50, [20, 40, 50])):
        assert run.step(step, best=step != 40) == expected
    assert run.best() == 50
    run.step(60, best=True, ending=True)
    assert run.step(70, best=True) == [20, 40, 60, 70]


def test_without_the_option_nothing_changes(job, tmp_path):
    run = job("--save-interval 20")
    assert [run.saver.due(step, ending) for step in (10, 20) for ending in (False, True)] == [False, True, True, True]
    for step in range(10, 60, 10):
        run.step(step)
    assert run.kept() == [20, 40]
    assert run.step(50, best=True) == [20, 40, 50]
    assert {path.name for path in (tmp_path / "run").glob("*.txt")} == {TRACKER, "best_checkpointed_iteration.txt"}


def test_a_run_without_a_folder_saves_nothing(dataset_prefix):
    words = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --train-iters 9 --lr 1 --micro-batch-size 1"
    arguments = parse_arguments(f"{words} --seq-length 128 --data-path {dataset_prefix}".split())
    assert not Saver(arguments, None).due(9, ending=True, best=True)


def test_other_ranks_touch_nothing(job, monkeypatch):
    run = job()
    run.step(10, best=True)
    monkeypatch.setattr(process_groups, "is_main", lambda: False)
    assert run.step(20, best=True) == [10, 20]
    assert run.best() == 10
    again = job()
    assert resume(again.arguments, None, again.log)[0].step == 20
    assert run.best() == 10
    record_best(run.folder, 30)  # as the main rank does
    assert run.step(30, best=True) == [10, 20, 30]


def test_ranks_that_start_from_different_checkpoints_are_refused(job, monkeypatch):
    run = job()
    agree_on_start(run.arguments)
    run.step(10, ending=True)
    monkeypatch.setattr(process_groups, "of_all_ranks", lambda mine: [mine, mine, "iter_0000020"])
    with pytest.raises(InputError, match=r"rank 0 starts from iter_0000010, rank 2 from iter_0000020: ") as refusal:
        agree_on_start(job().arguments)
    assert refusal.value.code == FAILED


def test_a_lost_tracker_is_written_again(job, capsys):
    run = job()
    run.step(10, ending=True)
    restore_tracker(run.folder, job().arguments, run.log)
    (run.folder / TRACKER).unlink()
    capsys.readouterr()
    again = job()
    restore_tracker(run.folder, again.arguments, again.log)
    assert (run.folder / TRACKER).read_text() == "10\n"
    assert f"{TRACKER}, which names the newest checkpoint, is missing; it is iter_0000010" in capsys.readouterr().out


def test_a_restarted_job_removes_what_the_first_one_saved(job):
    job().step(10, best=True)
    run = job("--save-interval 25")
    run.step(25)
    assert run.step(30, best=True) == [25, 30]
    assert job().step(40, best=True) == [25, 40]


def interrupt(monkeypatch, where):
    """End the job at one point of its next save."""

    def killed(*arguments):
        raise Killed

    if where == "before the checkpoint is complete":
        monkeypatch.setattr(f"{__name__}.write_info", killed)
    elif where == "before the best is recorded":
        monkeypatch.setattr(saver, "record_best", killed)
    elif where == "before the removal":
        monkeypatch.setattr("mft_megatron.training.saving.removal.superseded", killed)
    else:
        monkeypatch.setattr("mft_megatron.training.saving.removal.set_aside", lambda path: killed(set_aside(path)))


POINTS = (
    "before the checkpoint is complete",
    "before the best is recorded",
    "before the removal",
    "in the middle of the removal",
)


@pytest.mark.parametrize(
    ("where", "kept", "best"), list(zip(POINTS, ([10], [10, 20], [10, 20], [20]), (10, 10, 20, 20), strict=True))
)
def test_an_interrupted_save_loses_nothing(job, monkeypatch, where, kept, best):
    job().step(10, best=True)
    with monkeypatch.context() as patch:
        interrupt(patch, where)
        with pytest.raises(Killed):
            job().step(20, best=True)
    again = job()
    assert again.kept() == kept
    assert again.best() == best
    # the job resumes from the state in checkpoint kept[-1], and nothing before it was better
    assert (again.resume(), again.best_step) == (kept[-1], kept[-1])
    assert again.best() == kept[-1]
    assert again.step(30, best=True) == [30]


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_saves_and_interruptions(job, monkeypatch, seed):
    rng = random.Random(seed)
    run, step, asked, best = job("--save-interval 3"), 0, set(), None
    for _ in range(12):
        step += 1
        improved, ending = rng.random() < 0.4, rng.random() < 0.1
        where = rng.choice([None, None, *POINTS])
        complete = True
        try:
            with monkeypatch.context() as patch:
                if where is not None:
                    interrupt(patch, where)
                run.step(step, improved, ending)
        except Killed:
            complete = where != POINTS[0]
        if complete and (ending or step % 3 == 0):
            asked.add(step)
        if complete and improved:
            best = step
        if where is not None:  # the job starts again, whether or not it was interrupted
            run = job("--save-interval 3")
            step = run.resume()
        kept = set(run.kept())
        assert asked <= kept
        if best is not None:
            assert run.best() == best
        if where is None and improved:
            assert kept == asked | {best}


def test_a_checkpoint_that_cannot_be_removed_is_named_and_the_run_continues(job, monkeypatch, capsys):
    run = job()
    run.step(10, best=True)

    def fail(path, target):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", fail)
        run.step(20, best=True)
    assert run.best() == 20
    assert "iter_0000010 is no longer the best checkpoint and cannot be removed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", 10),
        ("--finetune", None),
        ("--save elsewhere", 20),
        ("--load iter_0000020", 20),
        ("--load iter_0000005", None),
    ],
)
def test_resuming_from_an_older_checkpoint_restores_the_best_of_that_time(job, tmp_path, monkeypatch, words, expected):
    """The folder's best is again the one of the step that the run resumes from, since it replaces what came later."""
    run = job("--save-interval 5")
    run.step(5)
    run.step(10, best=True)
    run.step(20, best=True)
    monkeypatch.chdir(run.folder)
    elsewhere = "--save" in words
    words = f"--save-interval 10 {words}" if "--load" in words else f"--load iter_0000010 {words}"
    options = f"--num-layers 2 --hidden-size 32 --num-attention-heads 2 --train-iters 1000 --lr 1 {words}"
    options += f" --micro-batch-size 1 --data-path {run.arguments.data.data_path} --seq-length 128"
    arguments = parse_arguments(f"{options} {'' if elsewhere else '--save .'}".split())
    resume(arguments, None, run.log)
    if expected is None:
        with pytest.raises(InputError, match="no best checkpoint was kept there"):
            run.best()
    else:
        assert run.best() == expected
    assert not Path("elsewhere").exists()


def test_a_run_without_the_folders_it_reads_does_not_start():
    """It would train beside random weights."""
    arguments = SimpleNamespace(reads_hf=False, starts_from_adapter=True)
    with pytest.raises(ValueError, match="--hf-adapter: open the folder"):
        Sources().check(arguments)
    with pytest.raises(ValueError, match="--hf-checkpoint: open the folder"):
        Sources(adapter=object()).check(SimpleNamespace(reads_hf=True, starts_from_adapter=True))
    Sources(adapter=object()).check(arguments)


def test_old_descriptions_are_asked_for(job):
    run = job()
    run.step(10, best=True)
    file = iteration_folder(run.folder, 10) / INFO
    content = description_of(file)
    assert (content.pop("best"), content.pop("asked_for")) == (True, False)
    file.write_text(json.dumps({**content, "format_version": 2}))
    assert run.step(20, best=True) == [10, 20]


def test_adapters_name_their_model_by_its_whole_path(job, tmp_path, monkeypatch):
    """It is read again from elsewhere."""
    job().step(1, ending=True)
    monkeypatch.chdir(tmp_path)
    words = "--data-path data --seq-length 128 --micro-batch-size 2 --train-iters 10 --lr 1e-3 --save other --load run"
    arguments = parse_arguments(f"{words} --finetune --peft-type lora --save-adapters-only".split())
    assert arguments.base.path == Path("run/iter_0000001")
    assert description._base_of_adapters(arguments)[0] == str(tmp_path / "run" / "iter_0000001")


class FullDisk:
    """A disk that takes no checkpoint while ``full`` is true; counts attempts."""

    def __init__(self, monkeypatch):
        self.full, self.attempts, self.waits = True, [], []
        monkeypatch.setattr(checkpoint.Writer, "save", self._save)
        monkeypatch.setattr("time.sleep", self.waits.append)

    def _save(self, folder, trainer, info, state, when_complete):
        self.attempts.append(info.iteration)
        if self.full:
            path = iteration_folder(folder, info.iteration)
            raise SaveError(f"{path}: cannot be written (the disk is full)", path)
        fake_save(None, folder, trainer, info, state, when_complete)


def test_a_save_that_fails_is_tried_again_and_the_run_goes_on(job, monkeypatch, capsys):
    run = job("--save-interval 20")
    run.step(20)
    disk = FullDisk(monkeypatch)
    for step in range(21, 45):
        run.step(step)
    # at 40 as asked for, then a tenth of the interval later
    assert (disk.attempts, run.kept()) == ([40, 42], [20])
    disk.full = False
    for step in range(45, 62):
        run.step(step)
    assert (disk.attempts, run.kept()) == ([40, 42, 46, 60], [20, 46, 60])
    assert read_info(iteration_folder(run.folder, 46)).asked_for
    lines = [line for line in capsys.readouterr().out.splitlines() if "save failed" in line]
    assert len(lines) == 2
    assert lines[0].endswith(
        f"iter_0000040 | reason {run.folder}/iter_0000040: cannot be written (the disk is full) | failures 1 | next 42"
    )


def test_a_run_whose_saves_all_fail_ends(job, monkeypatch):
    run, disk = job("--save-interval 20"), FullDisk(monkeypatch)
    for step in range(1, 60):
        run.step(step)
    with pytest.raises(InputError, match="6 saves have failed in a row") as error:
        run.step(60)
    assert error.value.code == STORAGE
    assert disk.attempts == [20, 22, 26, 34, 40, 60]
    assert len(disk.attempts) == MOST_FAILURES


def test_a_background_save_that_fails_before_a_bad_step_does_not_end_the_run(job, monkeypatch, capsys):
    run = job("--save-interval 20")

    def fail(writer):
        raise SaveError(f"{run.folder}: cannot be written in the background", run.folder)

    monkeypatch.setattr(checkpoint.Writer, "finish", fail)
    run.saver.complete(Progress(25, 25), run.log)
    assert "step 25 | save failed" in capsys.readouterr().out
    assert run.saver.due(27, False)


def test_checkpoints_of_another_past_are_told_from_those_of_the_run(job):
    """A run goes back to its own alone: those after the one that it resumed from are of the run before."""
    run = job("--save-interval 5")
    for step in (10, 20, 30):
        run.step(step)

    def own(saver):
        return [step for step in (10, 20, 30, 40) if saver.of_this_run(step)]

    assert own(run.saver) == [10, 20, 30]
    again = job("--ckpt-step 20 --save-interval 5")
    assert own(again.saver) == [10, 20]
    again.step(40)
    assert own(again.saver) == [10, 20, 40]
    again.step(30)
    again.saver.go_back(20)
    assert own(again.saver) == [10, 20]


def test_the_last_save_of_a_run_is_tried_again_at_once_and_then_it_ends(job, monkeypatch):
    run, disk = job(), FullDisk(monkeypatch)
    with pytest.raises(InputError, match=r"the disk is full\); it was the last of the run") as error:
        run.step(10, ending=True)
    assert error.value.code == STORAGE
    assert disk.attempts == [10, 10, 10]
    assert tuple(disk.waits) == LAST_WAITS
    disk.full = False
    assert run.step(11, ending=True) == [11]


def test_a_best_that_cannot_be_recorded_ends_no_run(job, monkeypatch, capsys):
    run = job()
    run.step(10, best=True)

    def fail(folder, iteration):
        raise OSError(errno.EIO, "", str(folder / "best"))

    with monkeypatch.context() as patch:
        patch.setattr(saver, "record_best", fail)
        assert run.step(20, best=True) == [10, 20]
    assert run.best() == 10
    out = capsys.readouterr().out
    assert "best: cannot be written: Input/output error" in out
    assert "best True" not in out.splitlines()[-1]


def test_an_error_of_a_copy_names_what_was_written(job, tmp_path):
    (tmp_path / "from").write_bytes(bytes(100))
    job()
    copy = functools.partial(shutil.copyfile, tmp_path / "from", tmp_path / "to")
    with largest_file(50), pytest.raises(InputError) as error:
        process_groups.write_on_main(tmp_path, copy, "nothing")
    assert str(error.value).startswith(f"{tmp_path}/to: cannot be written: File too large")


def test_the_schedule_of_attempts():
    attempts = Attempts(interval=1000)
    steps = []
    for _ in range(MOST_FAILURES - 1):
        attempts.failed(0, "full")
        steps.append(attempts.next)
    assert steps == [100, 200, 400, 800, 1000]
    attempts.succeeded()
    assert not attempts.due(10**9)
    attempts.failed(7, "full")
    assert [attempts.due(step) for step in (106, 107)] == [False, True]
    without = Attempts(None)
    without.failed(7, "full")
    assert not without.due(10**9)


def test_the_last_checkpoints_are_kept(job):
    run = job("--save-interval 10 --keep-last 2 --save-retain-interval 30")
    for step, expected in ((10, [10]), (20, [10, 20]), (30, [20, 30]), (40, [30, 40]), (50, [30, 40, 50])):
        assert run.step(step) == expected
    assert run.step(55, best=True) == [30, 50, 55]
    assert run.step(60) == [30, 55, 60]
    assert run.step(70) == [30, 55, 60, 70]
    assert job("--save-interval 10 --keep-last 1").step(80) == [55, 80]
    remove_leftovers(run.folder)
    assert not list(run.folder.glob(".*"))


def test_what_waits_for_its_export_is_kept(job, monkeypatch):
    run = job("--save-interval 10 --keep-last 1")
    run.saver._exports = SimpleNamespace(waiting=[iteration_folder(run.folder, 10)], add=None, poll=list)
    run.step(10)
    assert run.step(20) == [10, 20]
    run.saver._exports.waiting = []
    assert run.step(30) == [30]


def test_checkpoints_of_an_abandoned_future_are_left_alone(job):
    run = job("--save-interval 10 --keep-last 1")
    for step in (10, 20, 30):
        iteration_folder(run.folder, step).mkdir(parents=True)
        info = run.saver._describer.describe(Progress(step, step), best=False, asked_for=True, evaluation_due=False)
        write_info(iteration_folder(run.folder, step), info)
    assert run.step(15, ending=True) == [15, 20, 30]
    assert run.step(40) == [40]


def test_files_are_removed_behind_the_run(tmp_path):
    folders = [iteration_folder(tmp_path, number) for number in range(3)]
    removal = Removal(CheckpointArguments())
    for folder in folders:
        folder.mkdir()
        removal._add(folder)
        assert not folder.exists()
    removal.finish()
    assert list(tmp_path.iterdir()) == []
    assert removal.problems() == []
    removal._waiting.append(tmp_path / "gone")
    removal._remove()
    assert removal.problems() == [f"{tmp_path}/gone cannot be removed (No such file or directory); remove it"]
    assert removal.problems() == []
