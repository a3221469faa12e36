"""pretrain_mft.py --dry-run through the command line, in a process of its own: it simulates a GPU."""

import json

from tests.dry_run.test_start import LLAMA
from tests.ranks import run_tool
from tests.refusals import refusal


def test_a_config_json_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    words = (
        "--seq-length 128 --bf16 --global-batch-size 4 --pipeline-model-parallel-size 2 --use-distributed-optimizer "
        "--world-size 4 --mock-data code=uniform:10:128 40 --gpu h100-80g --json"
    )
    process = run_tool("pretrain_mft.py", "--dry-run", "--hf-checkpoint", tmp_path / "config.json", *words.split())
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["about"][0] == "dry run: 4 rank(s) on NVIDIA H100 80 GB, simulated; PP 2 × DP 2; bf16"
    assert [(rank["rank"], rank["fits"], rank["layers"]) for rank in report["ranks"]] == [
        (0, "yes", [1, 2, 3, 4]),
        (2, "yes", [5, 6, 7, 8]),
    ]
    for rank in report["ranks"]:
        # weights of 2 bytes in buffers, gradients of 4, main weights and two states of half of them
        assert rank["resident"]["weights"] / rank["parameters"] - 2 < 0.01
        assert rank["resident"]["gradients"] / rank["parameters"] - 4 < 0.01
        assert abs(rank["resident"]["optimizer"] / rank["parameters"] - 6) < 0.1
        assert rank["peak"] >= sum(rank["resident"].values())
        assert rank["steps"][1]["micro_batches"] == 2
        assert {message["kind"] for message in rank["steps"][1]["messages"]} >= {"send", "receive", "reduce-scatter"}
    assert not list(tmp_path.glob("*_dataset.json"))


def test_torchrun_is_not_needed(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "start it without torchrun" in refusal(run_tool("pretrain_mft.py", "--dry-run"))
