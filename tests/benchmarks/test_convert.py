"""benchmarks/convert runs, and compares what it has converted."""

from tests.ranks import run_tool


def test_conversions_are_measured(tmp_path):
    options = ("--folder", tmp_path, "--hidden", 128, "--layers", 1, "--repeats", 1)
    process = run_tool("benchmarks/convert/convert.py", *options)
    assert process.returncode == 0, process.stderr
    rows = [line.split("|")[1:-1] for line in process.stdout.splitlines() if "GB |" in line]
    assert [row[1].strip() for row in rows] == ["copy", "hf-to-mcore", "mcore-to-hf"]
    assert all(float(row[2]) >= 0 and float(row[3]) > 0 for row in rows)
    assert not list(tmp_path.iterdir())
