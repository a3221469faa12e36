"""The files of a run folder by name.

::

    DIR/iter_0000010/                        Megatron-Core distributed checkpoint (torch_dist) …
    DIR/iter_0000010/mft_manifest.json       … sizes and hashes of its files …
    DIR/iter_0000010/mft_checkpoint.json     … and this project's description of it: CheckpointInfo
    DIR/latest_checkpointed_iteration.txt    iteration of the newest complete checkpoint (Megatron's name and content)
    DIR/best_checkpointed_iteration.txt      iteration of the checkpoint with the best evaluation
    DIR/config.yaml                          the effective configuration
    DIR/outcome.json                         how the newest start of the run ended
    DIR/starts.json                          the last starts, and how far each came
    DIR/owner.json, DIR/.owner.lock          the process that owns the folder, while there is one
    DIR/stalls/                              reports of hangs, a folder for each
    DIR/left_out.json                        global batches that --on-bad-step rollback leaves out
    DIR/metrics.jsonl                        one JSON object per logged step, evaluation or event
    DIR/tensorboard/                         the same scalars
    DIR/tokenizer/                           the tokenizer's files, so that an export is complete
    DIR/huggingface/                         for a model from Hugging Face: its config.json, generation configuration,
                                             tokenizer and licence, which an export copies unchanged

    DIR/.saving.iter_0000010.TOKEN           a checkpoint that is being written, and others of :mod:`.publishing`

A checkpoint gets its name when all of it is on the disk. The description is its last file: a folder without it is no
checkpoint. The files that name a checkpoint are written after it, and the checkpoints that they name are never removed.
"""

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
INFO = "mft_checkpoint.json"
MANIFEST = "mft_manifest.json"
CONFIG = "config.yaml"
OUTCOME = "outcome.json"
STARTS = "starts.json"
OWNER = "owner.json"
LOCK = ".owner.lock"
STALLS = "stalls"
METRICS = "metrics.jsonl"
LEFT_OUT = "left_out.json"
TENSORBOARD = "tensorboard"
TOKENIZER = "tokenizer"
HUGGINGFACE = "huggingface"
# copies under other names are not checkpoints of the run
_CHECKPOINT = re.compile(r"iter_\d{7,}")


def iteration_folder(folder: Path, iteration: int) -> Path:
    """The folder of the checkpoint of ``iteration`` in a run folder."""
    return folder / f"iter_{iteration:07d}"


def is_checkpoint(folder: Path | str) -> bool:
    """Whether ``folder`` is a run folder with a complete checkpoint, or itself one ``iter_NNNNNNN``."""
    folder = Path(folder)
    return folder.name.startswith("iter_") or (folder / TRACKER).exists() or bool(complete_checkpoints(folder))


def is_iteration_folder(path: Path) -> bool:
    """Whether a path has the name of an :func:`iteration_folder`."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def iteration_of(path: Path) -> int:
    """The iteration in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("iter_"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders of a run folder that have the names of checkpoints, complete or not, in the order of their iterations."""
    found = [path for path in folder.glob("iter_*") if is_iteration_folder(path) and path.is_dir()]
    return sorted(found, key=iteration_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run folder, whatever its files say of them, in the order of their iterations."""
    return [path for path in checkpoint_folders(folder) if (path / INFO).is_file()]
