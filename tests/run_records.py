"""Records in the ``metrics.jsonl`` of a run folder."""

import json
from pathlib import Path


def records(folder, kind):
    """All records of one kind, "train", "valid" or "event", in their order."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if record["kind"] == kind]


def events(folder, name):
    """All events of one name, in their order."""
    return [record for record in records(folder, "event") if record["event"] == name]
