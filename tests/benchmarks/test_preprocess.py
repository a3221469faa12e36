"""The benchmark of preprocessing runs, counts the same tokens everywhere and says what is missing; not how fast."""

import json

from tests.ranks import run_tool

OURS = ["preprocess_data.py, auto", "preprocess_data.py, hf"]
BARE = ["tokenizers.encode_batch", "gigatoken"]


def test_preprocess(tmp_path):
    file = tmp_path / "numbers.json"
    process = run_tool(
        "benchmarks/data/preprocess.py",
        *"--samples 60 --mean-tokens 100 --rounds 2 --vocab-size 600 --larger 2 --work".split(),
        *(tmp_path, "--json", file, "--only", *OURS, *BARE, "MFTCoder, offline"),
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(file.read_text())["results"]
    assert set(found) == {*OURS, *BARE, "MFTCoder, offline"}
    assert "--mftcoder is not given" in found.pop("MFTCoder, offline")["missing"]
    assert "left out: --mftcoder is not given" in process.stdout
    for name, one in found.items():
        assert one["missing"] is None
        assert len(one["readings"]) == 2
        assert min(one[key] for key in ("cpu", "wall", "startup", "rss", "to_ours")) > 0
        assert f"| {name} | {one['cpu']:.2f} |" in process.stdout
        assert ("rss_larger" in one) == (name in OURS)
    assert found[OURS[0]]["to_ours"] == 1
    for names in (OURS, BARE):
        assert len({found[name]["tokens"] for name in names}) == 1
    # ours writes turns, with the tokens that open and end them
    assert found[OURS[0]]["tokens"] > found[BARE[0]]["tokens"] > 1000
