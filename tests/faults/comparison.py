"""Comparison of an interrupted run with the uninterrupted one: everything but clocks and paths is equal."""

import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# fields of records that tell the time, or where
CLOCKS = {"step_time", "balance_time", "balance_share", "tflops", "seconds", "time"}


def digests(run_folder: Path) -> dict[str, dict[str, str]]:
    """Digests of each tensor and of the common state, for each checkpoint of a run folder."""
    import torch

    from tests.saved_checkpoints import tensors_of

    # torch says that it reads in a single process
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
    found = {}
    for path in sorted(run_folder.glob("iter_*")):
        of_path = {
            name: f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes_of(tensor)).hexdigest()}"
            for name, tensor in tensors_of(path).items()
        }
        common = torch.load(path / "common.pt", weights_only=False)
        of_path["common.pt"] = hashlib.sha256(_canonical(common)).hexdigest()
        found[path.name] = of_path
    return found


def _bytes_of(tensor: "torch.Tensor") -> bytes:
    import torch

    # a tensor of one element may have the stride 0, which a view of bytes cannot have
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(torch.uint8).numpy().tobytes()


def _canonical(value: object) -> bytes:
    """Bytes of a nested value that are equal for equal values."""
    import torch

    if isinstance(value, torch.Tensor):
        return b"tensor" + _bytes_of(value)
    if isinstance(value, dict):
        return b"{" + b",".join(_canonical(key) + b":" + _canonical(value[key]) for key in value) + b"}"
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(_canonical, value)) + b"]"
    if isinstance(value, float | int | str | bool | None):
        return repr(value).encode()
    return pickle.dumps(value)


# Said to be the owner's until the next start takes the folder over: a run that is killed after its last save has none.
LEFT = {".owner.lock", "owner.json"}


def listing(folder: Path) -> list[str]:
    """Files and folders below ``folder``, without those of TensorBoard, which writes a file for each start."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in paths if "tensorboard" not in path.parts and path.name not in LEFT)


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files below ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(run_folder: Path) -> tuple[dict[str, dict], list[str]]:
    """The steps, evaluations and epochs of ``metrics.jsonl`` without clocks, and what is wrong with it.

    Steps after the checkpoint that a run resumed from are there again, with the same numbers.
    """
    found: dict[str, dict] = {}
    problems = []
    for number, line in enumerate((run_folder / "metrics.jsonl").read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            problems.append(f"metrics.jsonl:{number}: not a record: {line[:80]}")
            continue
        if record["kind"] == "event" and record["event"] != "epoch":
            continue
        record = {name: value for name, value in record.items() if name not in CLOCKS}
        key = f"{record['kind']} {record['step']} {record.get('epoch', '')}".strip()
        if found.setdefault(key, record) != record:
            what = difference(found[key], record)
            problems.append(f"metrics.jsonl:{number}: {key} differs from the same before: {what}")
    return found, problems


def difference(expected: object, got: object, where: str = "") -> str:
    """The first difference of two nested values, in a phrase; empty if they are equal."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            if key not in got:
                return f"{where}{key} is missing"
            if key not in expected:
                return f"{where}{key} should not be there"
            if inner := difference(expected[key], got[key], f"{where}{key}: "):
                return inner
        return ""
    if isinstance(expected, list) and isinstance(got, list):
        missing = [item for item in expected if item not in got]
        added = [item for item in got if item not in expected]
        if missing or added:
            return f"{where}missing {missing[:4]}, added {added[:4]}"
    return "" if expected == got else f"{where}{expected!r} became {got!r}"
