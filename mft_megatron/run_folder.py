"""The files of a run, and the description of a checkpoint, which is read before any weight.

::

    DIR/iter_0000010/                        Megatron-Core distributed checkpoint (torch_dist) …
    DIR/iter_0000010/mft_checkpoint.json     … and this project's description of it: CheckpointInfo
    DIR/latest_checkpointed_iteration.txt    iteration of the newest complete checkpoint (Megatron's name and content)
    DIR/best_checkpointed_iteration.txt      iteration of the checkpoint with the best evaluation
    DIR/config.yaml                          the effective configuration
    DIR/metrics.jsonl                        one JSON object per logged step, evaluation or event
    DIR/tensorboard/                         the same scalars
    DIR/tokenizer/                           the tokenizer's files, so that an export is complete
    DIR/huggingface/                         for a model from Hugging Face: its config.json, generation configuration,
                                             tokenizer and licence, which an export copies unchanged

The description is written last and renamed into place: a folder without it is an unfinished save and is not loaded.
The files that name a checkpoint are written after it, and the checkpoints that they name are never removed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mft_megatron.checkpoint_files import remedy
from mft_megatron.common_state import read_args, read_common
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
INFO = "mft_checkpoint.json"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TOKENIZER = "tokenizer"
HUGGINGFACE = "huggingface"
# The files of a Hugging Face tokenizer; their folder may also hold a model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Version 2 stores optimizer states by weight, independent of the optimizer; of version 1 only weights can be loaded.
# Version 3 names the order of the data that the run follows, and its normalisation.
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
# ``source`` of a model from Megatron-LM that no Hugging Face architecture can express.
OF_NO_FAMILY = "Megatron-LM"
# content_digest reads this many blocks of each file, of this many bytes.
_DIGEST_BLOCKS, _DIGEST_BYTES = 64, 4096


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The description of one checkpoint, stored as JSON with these names.

    Attributes:
        iteration: optimizer steps of the run.
        consumed_samples: packs consumed.
        architecture: the fields of ``NetworkArguments``.
        vocab_size: rows of the vocabulary before padding.
        tokenizer: the ledger's entry, ``stop_token_ids``, and ``chat_template``: the chat format of most chats, with
            the Jinja text, where the data set records it.
        dataset_hash: the data set; with ``seed`` and ``order_version`` it identifies the data order of the run.
        seed: seed of weights, dropout and data order.
        global_batch_size: packs of a step, after a ramp-up.
        skipped_steps: steps that the loss scale skipped.
        has_optimizer: whether it holds optimizer states.
        has_rng: whether it holds the states of random number generators.
        precision: fp32, bf16 or fp16.
        optimizer: adam, sgd, or sgd without momentum; the states are the same with ``distributed_optimizer`` and
            without.
        distributed_optimizer: whether the distributed optimizer wrote it.
        decoupled_lr: whether the optimizer has a group for the learning rate of embedding and output layer.
        layout: sizes of the parallel layout by name, and the kind of device; what is stored per rank fits these only.
        best: its evaluation was the best of the run so far.
        asked_for: saved because of ``--save-interval`` or at an end of the run. One that was saved only as the best is
            removed when there is a better one.
        source: the Hugging Face architecture that the model came from, if any; its vocabulary may be larger than the
            tokenizer's.
        lora: :meth:`.lora.Lora.as_dict` of its adapters, if any.
        peft_type: how adapters were trained: lora or qlora.
        has_base: whether it holds the model; if not, it holds only adapters.
        base: the folder that the model of the adapters was read from.
        base_digest: :func:`content_digest` of ``base``.
        order_version: version of the order of packs (docs/FORMATS.md); 1 where a checkpoint does not say.
        mft_normalization: ``--mft-normalization``; older checkpoints do not say, and it was global unless it was given.
        format_version: version of this format.
    """

    iteration: int
    consumed_samples: int
    architecture: dict[str, Any]
    vocab_size: int
    tokenizer: dict[str, Any]
    dataset_hash: str
    seed: int
    global_batch_size: int
    skipped_steps: int = 0
    has_optimizer: bool = True
    has_rng: bool = True
    precision: str = "fp32"
    optimizer: str = "adam"
    distributed_optimizer: bool = False
    decoupled_lr: bool = False
    layout: dict[str, int | str] = dataclasses.field(default_factory=dict)
    best: bool = False
    asked_for: bool = True
    source: str = ""
    lora: dict[str, Any] | None = None
    peft_type: str = "none"
    has_base: bool = True
    base: str = ""
    base_digest: str = ""
    order_version: int = 1
    mft_normalization: str = "global"
    format_version: int = FORMAT_VERSION

    @property
    def is_converted(self) -> bool:
        """Whether it was converted from a Hugging Face model; no run has trained it."""
        return self.source != "" and self.dataset_hash == ""

    @property
    def from_hugging_face(self) -> bool:
        """Whether an export copies the configuration of the Hugging Face model that it came from."""
        return self.source not in ("", OF_NO_FAMILY)


class DamagedCheckpointError(InputError):
    """A checkpoint is unfinished or damaged; another one may be whole."""


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """The folder and the description of a checkpoint, or of a Hugging Face model that is read like one."""

    path: Path
    info: CheckpointInfo


def iteration_folder(folder: Path, iteration: int) -> Path:
    """The folder of the checkpoint of ``iteration`` in a run folder."""
    return folder / f"iter_{iteration:07d}"


def is_checkpoint(folder: Path | str) -> bool:
    """Whether ``folder`` is a run folder with a complete checkpoint, or itself one ``iter_NNNNNNN``."""
    folder = Path(folder)
    return folder.name.startswith("iter_") or (folder / TRACKER).exists()


def latest_checkpoint(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """Return the newest complete checkpoint in ``folder``, which may also be one ``iter_NNNNNNN`` itself.

    Raises:
        InputError: there is none, or it is unfinished or has another format.
    """
    folder = Path(folder)
    if folder.name.startswith("iter_") and folder.is_dir():
        return _described(folder, option)
    absent, otherwise = "no checkpoint was completed there", f"give a folder that --save wrote, or leave {option} out"
    return _named_checkpoint(folder, TRACKER, option, absent, otherwise)


def checkpoint_of(folder: Path | str, iteration: int, option: str = "--load") -> CheckpointRef:
    """Return the complete checkpoint of one iteration in ``folder``.

    Raises:
        InputError: there is none, or it is unfinished or has another format.
    """
    path = iteration_folder(Path(folder), iteration)
    if not path.is_dir():
        there = ", ".join(sorted(found.name for found in Path(folder).glob("iter_*"))) or "no checkpoint"
        raise InputError(f"{option} {folder} --ckpt-step {iteration}: {path} does not exist; there is {there}")
    return _described(path, option)


def best_checkpoint(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """Return the checkpoint with the best evaluation of the run in ``folder``.

    Raises:
        InputError: no best checkpoint was kept, or it is unfinished or has another format.
    """
    absent, otherwise = (
        "no best checkpoint was kept there",
        "give the folder of a run that kept one, or take its newest",
    )
    return _named_checkpoint(Path(folder), BEST, option, absent, otherwise)


def select_checkpoint(folder: Path | str, best: bool, option: str = "--load") -> CheckpointRef:
    """Return :func:`best_checkpoint` or :func:`latest_checkpoint`."""
    return best_checkpoint(folder, option) if best else latest_checkpoint(folder, option)


def refuse_adapters(checkpoint: CheckpointRef) -> None:
    """Check that a checkpoint is a plain model, the only thing that becomes a Hugging Face model.

    Raises:
        InputError: the checkpoint has adapters.
    """
    if checkpoint.info.lora is not None:
        raise InputError(
            f"--load {checkpoint.path}: has adapters; merge-lora writes the model with them merged into it, "
            "lora-to-peft writes them alone"
        )


def _named_checkpoint(folder: Path, file_name: str, option: str, absent: str, otherwise: str) -> CheckpointRef:
    """Return the checkpoint whose iteration is in a file of ``folder``.

    Args:
        folder: the run folder.
        file_name: name of the file with the iteration.
        option: the option that gave the folder, for messages.
        absent: what a missing file means, for messages.
        otherwise: what to do then.
    """
    file = folder / file_name
    if not file.is_file():
        what = "does not exist" if not folder.exists() else f"has no {file_name}, so {absent}"
        raise InputError(f"{option} {folder}: {what}; {otherwise}")
    text = file.read_text().strip()
    if text == "release" and is_of_megatron(folder / text):
        return CheckpointRef(folder / text, read_info(folder / text, option))
    if not text.isdecimal():
        raise InputError(
            f"{file}: {text!r} is not an iteration number; write the number of an existing iter_ folder; "
            f"{remedy(file, INFO)}"
        )
    path = iteration_folder(folder, int(text))
    if not path.is_dir():
        raise InputError(
            f"{file} names iteration {text}, but {path} does not exist; correct the number in it; {remedy(path, INFO)}"
        )
    return _described(path, option)


def _described(path: Path, option: str) -> CheckpointRef:
    """Return the checkpoint ``path``; of a damaged one the error names the newest whole one beside it.

    Raises:
        InputError: as :func:`read_info`.
    """
    try:
        return CheckpointRef(path, read_info(path, option))
    except DamagedCheckpointError as error:
        raise InputError(f"{error}; {remedy(path, INFO)}") from None


def record_best(folder: Path, iteration: int) -> None:
    """Record the complete checkpoint of ``iteration`` as the best of the run in ``folder``."""
    replace_text(folder / BEST, f"{iteration}\n")


def restore_best(folder: Path, iteration: int | None) -> None:
    """Record the checkpoint of ``iteration`` as the best again, for a run that resumes from an earlier iteration.

    If it does not exist, or was not saved as the best, the run has no best checkpoint.
    """
    if iteration is not None:
        path = iteration_folder(folder, iteration)
        if path.is_dir() and read_info(path).best:
            record_best(folder, iteration)
            return
    (folder / BEST).unlink(missing_ok=True)


def superseded(folder: Path) -> list[Path]:
    """Checkpoints that were saved only as the best and are no longer the best nor the newest, oldest first.

    All such checkpoints in ``folder``, including those that an interrupted job did not remove.
    """
    return [found.path for found in _unnamed(folder) if not found.info.asked_for]


def not_retained(folder: Path, interval: int) -> list[Path]:
    """Checkpoints whose iteration is not a multiple of ``interval`` and that are neither the newest nor the best."""
    return [found.path for found in _unnamed(folder) if found.info.iteration % interval]


def _unnamed(folder: Path) -> list[CheckpointRef]:
    """Complete checkpoints of the run in ``folder`` except the newest and the best, in the order of their names."""
    named = [latest_checkpoint(folder).path]
    if (folder / BEST).is_file():
        named.append(best_checkpoint(folder).path)
    found = []
    for path in sorted(folder.glob("iter_*")):
        if path in named or path.is_symlink() or not path.is_dir():
            continue
        try:
            info = read_info(path)
        except InputError:  # unfinished, or written by another program
            continue
        # A copy that the user made under another name has the iteration of its original.
        if path == iteration_folder(folder, info.iteration):
            found.append(CheckpointRef(path, info))
    return found


def content_digest(folder: Path) -> str:
    """Digest of a model's weight files, in hex: of their names and sizes, and of some blocks of each.

    Args:
        folder: a Hugging Face model or one checkpoint. Less than a mebibyte of each file is read.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".distcp")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for block in range(_DIGEST_BLOCKS):
                stream.seek(size * block // _DIGEST_BLOCKS)
                digest.update(stream.read(_DIGEST_BYTES))
    return digest.hexdigest()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its description first, so that an interruption leaves an unfinished save."""
    (path / INFO).unlink()
    shutil.rmtree(path)


def read_info(path: Path, option: str = "--load") -> CheckpointInfo:
    """Read the description of the checkpoint in ``path``.

    Raises:
        DamagedCheckpointError: it is missing (an unfinished save), or unreadable.
        InputError: it has another version, or another program wrote the checkpoint.
    """
    file = path / INFO
    try:
        content = json.loads(file.read_text())
        version = content.get("format_version", FORMAT_VERSION) if isinstance(content, dict) else FORMAT_VERSION
        if version not in READABLE_VERSIONS:  # before its fields, which may be others
            known = ", ".join(map(str, READABLE_VERSIONS))
            raise InputError(f"{file}: format version {version}, this program reads {known}")
        info = CheckpointInfo(**content)
        if info.lora is not None:
            Lora.from_dict(info.lora)
    except FileNotFoundError:
        if is_of_megatron(path):
            raise InputError(
                f"{option} {path}: Megatron-LM or Megatron-Bridge wrote it; convert it first: "
                f"tools/convert_checkpoint.py megatron-to-mcore --load {path} --save CKPT"
            ) from None
        raise DamagedCheckpointError(f"{option} {path}: no {INFO}, so this save was never finished") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpointError(f"{file}: not a checkpoint description ({error}); the file is damaged") from None
    return info


def is_of_megatron(path: Path) -> bool:
    """Whether Megatron-Bridge or Megatron-LM wrote the checkpoint ``path``.

    Megatron-Bridge stores its configuration there, Megatron-LM its arguments in the common state.
    """
    if (path / "run_config.yaml").is_file():
        return True
    try:
        return read_args(read_common(path)) is not None
    except InputError:
        return False


def write_info(path: Path, info: CheckpointInfo) -> None:
    """Write ``info`` into the checkpoint folder ``path``, as the last file of a save."""
    replace_text(path / INFO, json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def effective_configuration(options: Mapping[str, object], world_size: int) -> str:
    """The content of ``config.yaml``: the value of every option, for ``--yaml-cfg``, and the number of ranks."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return yaml.safe_dump({**plain, "world_size": world_size}, sort_keys=False)


def copy_tokenizer(model: Path, target: Path) -> bool:
    """Copy the files of a tokenizer, and nothing else, into the folder ``target``.

    Args:
        model: the tokenizer's folder, or a file in it. A SentencePiece model gets the name that transformers expects.
        target: created if needed.

    Returns:
        whether there were any files.
    """
    folder = model if model.is_dir() else model.parent
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if model.is_file() and model.suffix == ".model":
        found["tokenizer.model"] = model
    if not model.exists() or not found:
        return False
    target.mkdir(parents=True, exist_ok=True)
    for name, file in found.items():
        shutil.copyfile(file, target / name)
    return True


def replace_text(path: Path, text: str) -> None:
    """Write a small text file atomically: a reader sees the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
