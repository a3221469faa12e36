"""``tools/inspect_checkpoint.py`` shows checkpoints and run folders, and finds damage."""

import dataclasses
import json
import shutil

import pytest

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED, DIVERGED, FAILED, FINISHED, OWNED
from mft_megatron.run_folder.inspection.command import inspect_checkpoint
from mft_megatron.run_folder.names import INFO, OWNER
from mft_megatron.run_folder.outcome import record_outcome, record_running
from mft_megatron.run_folder.owner.record import this_process
from mft_megatron.run_folder.retention import record_best
from tests.ranks import run_tool
from tests.saved_checkpoints import write_small


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    layout = {"world": 4, "tensor": 2, "pipeline": 1, "data": 2}
    for iteration in (10, 20, 30):
        write_small(folder, iteration, layout=layout, precision="bf16", source="LlamaForCausalLM")
    record_best(folder, 10)
    return folder


def shown(capsys, *words):
    code = inspect_checkpoint([str(word) for word in words])
    return code, capsys.readouterr().out.splitlines()


def change_byte(file):
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def test_a_table_of_the_checkpoints_of_a_run(run, capsys):
    code, lines = shown(capsys, run)
    assert (code, lines[0]) == (FINISHED, f"{run}: newest iter_0000030, best iter_0000010")
    assert lines[1].split() == ["checkpoint", "step", "packs", "GB", "precision", "optimizer", "layout", "state"]
    rows = [line.split("  ") for line in lines[2:]]
    assert [row[0].strip() for row in rows] == [
        "iter_0000010 (best)",
        "iter_0000020",
        "iter_0000030 (newest)",
    ]
    assert all(
        "ranks 4 TP 2 DP 2" in line and line.endswith("no damage found (not all bytes were read)") for line in lines[2:]
    )
    change_byte(run / "iter_0000020" / "__1_0.distcp")
    assert shown(capsys, run)[0] == FINISHED  # sizes alone
    (run / "iter_0000010" / INFO).unlink()
    (run / ".saving.iter_0000040.ab").mkdir()
    record_outcome(run, DIVERGED, "loss is NaN", 30)
    code, lines = shown(capsys, run, "--verify", "full")
    assert code == DAMAGED
    assert lines[1].startswith("outcome: diverged at step 30: loss is NaN (")
    assert lines[2] == "unfinished: .saving.iter_0000040.ab"
    assert "damaged: its file __1_0.distcp is damaged: bytes 0 to" in lines[5]
    assert "so this save was never finished" in lines[4]
    assert lines[6].endswith("  whole")


def test_one_checkpoint(run, capsys):
    path = run / "iter_0000020"
    (path / "notes.txt").write_text("mine")
    code, lines = shown(capsys, path)
    assert (code, lines[0]) == (FINISHED, f"{path}: whole")
    text = "\n".join(lines)
    assert "step 20, 160 packs" in text
    assert "model: LlamaForCausalLM; vocabulary 10; bf16" in text
    assert "11 files, 0.00 GB: 5 weights, 0 optimizer states, 0 objects" in text
    assert "not of the checkpoint: notes.txt" in text
    assert "written on: world 4, tensor 2, data 2" in text
    for level, state in (
        ("sizes", "no damage found (not all bytes were read)"),
        ("off", "not looked at (--verify off)"),
    ):
        code, lines = shown(capsys, path, "--verify", level)
        assert (code, lines[0]) == (FINISHED, f"{path}: {state}")
        assert f"(--verify {level})" in lines[-1]
    change_byte(path / "__0_0.distcp")
    code, lines = shown(capsys, path)
    assert code == DAMAGED
    assert lines[0].startswith(f"{path}: damaged: its file __0_0.distcp is damaged")


def test_json_has_everything(run):
    done = run_tool("tools/inspect_checkpoint.py", run, "--json")
    assert (done.returncode, done.stderr) == (FINISHED, "")
    facts = json.loads(done.stdout)
    assert (facts["newest"], facts["best"], facts["owner"], facts["outcome"]) == (
        "iter_0000030",
        "iter_0000010",
        None,
        None,
    )
    [first, *_] = facts["checkpoints"]
    assert first["description"]["iteration"] == 10
    assert first["damage"] is None
    assert first["bytes"] == sum(file.stat().st_size for file in (run / "iter_0000010").iterdir())


def test_the_outcome_is_the_exit_code(run, capsys):
    with pytest.raises(InputError, match="no run has recorded an outcome there; give a run folder"):
        shown(capsys, run, "--outcome")
    record_running(run, 3)
    killed = ["running, or killed before it could say how it ended; at step 3 or later"]
    assert shown(capsys, run, "--outcome") == (FAILED, killed)
    record_outcome(run, DIVERGED, "loss is NaN", 30)
    assert shown(capsys, run, "--outcome") == (DIVERGED, ["diverged at step 30: loss is NaN"])
    code, lines = shown(capsys, run, "--outcome", "--json")
    facts = json.loads("\n".join(lines))
    assert (code, facts["name"], facts["step"], facts["exit_code"]) == (DIVERGED, "diverged", 30, DIVERGED)


def test_a_run_that_goes_on_in_another_job_is_not_a_start_that_was_killed(run, capsys, monkeypatch):
    record_running(run, 3)
    (run / OWNER).write_text(json.dumps(dataclasses.asdict(this_process("training", {"SLURM_JOB_ID": "7"}))))
    for job, code in (("7", FAILED), ("8", OWNED)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert shown(capsys, run, "--outcome")[0] == code
    monkeypatch.delenv("SLURM_JOB_ID")
    assert shown(capsys, run, "--outcome")[0] == FAILED


def test_what_cannot_be_inspected_is_refused(run, tmp_path, capsys):
    with pytest.raises(InputError, match="no checkpoint is there; give a folder"):
        shown(capsys, tmp_path)
    record_outcome(tmp_path, DIVERGED, "loss is NaN", 2)
    with pytest.raises(InputError, match="no checkpoint is there; --outcome says"):
        shown(capsys, tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        shown(capsys, tmp_path / "nothing")
    (run / "latest_checkpointed_iteration.txt").write_text("40")
    shutil.rmtree(run / "iter_0000010")
    assert (
        shown(capsys, run)[1][0] == f"{run}: newest iter_0000040, which is missing, best iter_0000010, which is missing"
    )
