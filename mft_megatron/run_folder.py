"""Where a run keeps its files, and what a checkpoint says about itself before anything is loaded.

::

    DIR/iter_0000010/                        Megatron-Core distributed checkpoint (torch_dist) …
    DIR/iter_0000010/mft_checkpoint.json     … and this project's description of it: CheckpointInfo
    DIR/latest_checkpointed_iteration.txt    the newest complete one (Megatron's name and content)
    DIR/best_checkpointed_iteration.txt      the one with the best evaluation, likewise
    DIR/config.yaml                          the effective configuration
    DIR/metrics.jsonl                        one JSON object per logged step, evaluation or event
    DIR/tensorboard/                         the same scalars
    DIR/tokenizer/                           the tokenizer's files, so that an export is complete
    DIR/huggingface/                         of a model that came from Hugging Face: its config.json, generation
                                             configuration, tokenizer and licence, to be given back as they were

The description is written last and renamed into place: a folder without it is an unfinished save and is not loaded.
The files that name a checkpoint are written after it, and clearing up spares what they name.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

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
# What makes a Hugging Face tokenizer; a folder that has it may hold a whole model besides.
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
# 2: states of the optimizer are stored by weight, whatever optimizer wrote them; of 1 the weights can be read
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
# source of a model from Megatron-LM that no architecture of Hugging Face expresses
OF_NO_FAMILY = "Megatron-LM"
_DIGEST_PIECES, _DIGEST_BYTES = 64, 4096


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What one checkpoint holds.

    ``architecture``: the fields of ``NetworkArguments``. ``tokenizer``: the ledger's entry, and
    ``stop_token_ids``. ``vocab_size``: rows of the vocabulary before padding.
    ``consumed_samples`` counts packs. ``precision``: fp32, bf16 or fp16. ``optimizer``: adam, sgd,
    or sgd without momentum, whose states are the same with and without the
    ``distributed_optimizer``. ``decoupled_lr``: whether the optimizer has a group for the rate of
    embedding and output layer. ``layout``: sizes by name, and the kind of device, for what belongs
    to one layout.
    ``dataset_hash`` and ``seed`` identify the data order that was being followed.
    ``best``: its evaluation was the best of the run until then. ``asked_for``: it was due, at
    ``--save-interval`` or at an end of the run; one that was saved for being the best alone goes
    when a better one comes. ``source``: the Hugging Face architecture that the model came as, if
    it did; its vocabulary may be larger than the tokenizer's. ``lora``: what
    :meth:`.lora.Lora.as_dict` says of its adapters, if it has any, and ``peft_type`` how they were
    trained: lora or qlora. ``has_base``: or it holds the adapters alone. ``base``: the folder that
    the model beside them was read from, ``base_digest`` its :func:`content_digest`.
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
    format_version: int = FORMAT_VERSION

    @property
    def is_converted(self) -> bool:
        """Whether it was made from a Hugging Face model, has no run behind it, and a run starts from it."""
        return self.source != "" and self.dataset_hash == ""

    @property
    def from_hugging_face(self) -> bool:
        """Whether an export gets the configuration of the model that it came as."""
        return self.source not in ("", OF_NO_FAMILY)

    @property
    def optimizer_steps(self) -> int:
        """How often the optimizer has stepped; one that never has leaves no state behind."""
        return self.iteration - self.skipped_steps


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """The folder and the description of a checkpoint, or of a Hugging Face model that is read like one."""

    path: Path
    info: CheckpointInfo


def iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def is_checkpoint(folder: Path | str) -> bool:
    """Whether a save was ever completed in ``folder``, or ``folder`` is itself one ``iter_NNNNNNN``."""
    folder = Path(folder)
    return folder.name.startswith("iter_") or (folder / TRACKER).exists()


def latest_checkpoint(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """The newest complete checkpoint below ``folder``; ``folder`` may also be one ``iter_NNNNNNN`` itself.

    Raises:
        InputError: there is none, or it is unfinished or of another format.
    """
    folder = Path(folder)
    if folder.name.startswith("iter_") and folder.is_dir():
        return CheckpointRef(folder, read_info(folder, option))
    absent, remedy = "no checkpoint was completed there", f"give a folder that --save wrote, or leave {option} out"
    return _named_checkpoint(folder, TRACKER, option, absent, remedy)


def checkpoint_of(folder: Path | str, iteration: int, option: str = "--load") -> CheckpointRef:
    """The complete checkpoint of one iteration below ``folder``.

    Raises:
        InputError: there is none, or it is unfinished or of another format.
    """
    path = iteration_folder(Path(folder), iteration)
    if not path.is_dir():
        there = ", ".join(sorted(found.name for found in Path(folder).glob("iter_*"))) or "no checkpoint"
        raise InputError(f"{option} {folder} --ckpt-step {iteration}: {path} does not exist; there is {there}")
    return CheckpointRef(path, read_info(path, option))


def best_checkpoint(folder: Path | str, option: str = "--load") -> CheckpointRef:
    """The checkpoint of the run in ``folder`` that has the best evaluation.

    Raises:
        InputError: none was kept for that, or it is unfinished or of another format.
    """
    absent, remedy = "no best checkpoint was kept there", "give the folder of a run that kept one, or take its newest"
    return _named_checkpoint(Path(folder), BEST, option, absent, remedy)


def select_checkpoint(folder: Path | str, best: bool, option: str = "--load") -> CheckpointRef:
    """The best checkpoint of the run in ``folder``, or its newest, by :func:`best_checkpoint` or
    :func:`latest_checkpoint`."""
    return best_checkpoint(folder, option) if best else latest_checkpoint(folder, option)


def _named_checkpoint(folder: Path, file_name: str, option: str, absent: str, remedy: str) -> CheckpointRef:
    """The checkpoint whose iteration stands in a file of ``folder``; ``absent`` says what it means to lack the file."""
    file = folder / file_name
    if not file.is_file():
        what = "does not exist" if not folder.exists() else f"has no {file_name}, so {absent}"
        raise InputError(f"{option} {folder}: {what}; {remedy}")
    text = file.read_text().strip()
    if text == "release" and is_of_megatron(folder / text):
        return CheckpointRef(folder / text, read_info(folder / text, option))
    if not text.isdecimal():
        raise InputError(f"{file}: {text!r} is not an iteration number; write the number of an existing iter_ folder")
    path = iteration_folder(folder, int(text))
    if not path.is_dir():
        raise InputError(f"{file} names iteration {text}, but {path} does not exist; correct the number in it")
    return CheckpointRef(path, read_info(path, option))


def record_best(folder: Path, iteration: int) -> None:
    """Name the complete checkpoint of ``iteration`` the best of the run in ``folder``."""
    replace_text(folder / BEST, f"{iteration}\n")


def restore_best(folder: Path, iteration: int | None) -> None:
    """Name the checkpoint of ``iteration`` the best again, for a run that goes on in its folder from an earlier point;
    none where it is not there, or was not kept for being the best."""
    path = iteration_folder(folder, iteration) if iteration is not None else None
    if path is not None and path.is_dir() and read_info(path).best:
        record_best(folder, iteration)
    else:
        (folder / BEST).unlink(missing_ok=True)


def superseded(folder: Path) -> list[Path]:
    """Checkpoints that were saved for being the best alone and are neither that any more nor the newest; oldest first.

    Every one in ``folder``: where a job was ended before it removed one, that goes with the next.
    """
    return [found.path for found in _unnamed(folder) if not found.info.asked_for]


def not_retained(folder: Path, interval: int) -> list[Path]:
    """Checkpoints of iterations that ``interval`` does not divide and that are neither the newest nor the best."""
    return [found.path for found in _unnamed(folder) if found.info.iteration % interval]


def _unnamed(folder: Path) -> list[CheckpointRef]:
    """Complete checkpoints of the run in ``folder`` but for the newest and the best; by name."""
    named = [latest_checkpoint(folder).path]
    if (folder / BEST).is_file():
        named.append(best_checkpoint(folder).path)
    found = []
    for path in sorted(folder.glob("iter_*")):
        if path in named or path.is_symlink() or not path.is_dir():
            continue
        try:
            info = read_info(path)
        except InputError:  # unfinished, or not ours
            continue
        # a copy that the user made under another name still has the iteration of its original
        if path == iteration_folder(folder, info.iteration):
            found.append(CheckpointRef(path, info))
    return found


def content_digest(folder: Path) -> str:
    """What tells one model's weight files from another's, in hex: their sizes, and some pieces of each.

    Of a folder that holds a Hugging Face model or one checkpoint. Reads less than a mebibyte of each file.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".distcp")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for place in range(_DIGEST_PIECES):
                stream.seek(size * place // _DIGEST_PIECES)
                digest.update(stream.read(_DIGEST_BYTES))
    return digest.hexdigest()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its description first: what is left after an interruption counts as an unfinished save."""
    (path / INFO).unlink()
    shutil.rmtree(path)


def read_info(path: Path, option: str = "--load") -> CheckpointInfo:
    """The description of the checkpoint in ``path``.

    Raises:
        InputError: it is missing (an unfinished save), unreadable, or of another version.
    """
    file = path / INFO
    try:
        content = json.loads(file.read_text())
        info = CheckpointInfo(**content)
        if info.lora is not None:
            Lora.from_dict(info.lora)
    except FileNotFoundError:
        if is_of_megatron(path):
            raise InputError(
                f"{option} {path}: Megatron-LM or Megatron-Bridge wrote it; convert it first: "
                f"tools/convert_checkpoint.py megatron-to-mcore --load {path} --save CKPT"
            ) from None
        raise InputError(f"{option} {path}: no {INFO}, so this save was never finished; use another one") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: not a checkpoint description ({error}); the file is damaged") from None
    if info.format_version not in READABLE_VERSIONS:
        raise InputError(f"{file}: format version {info.format_version}, this program reads {FORMAT_VERSION}")
    return info


def is_of_megatron(path: Path) -> bool:
    """Whether another program on Megatron-Core wrote the checkpoint ``path``: Megatron-Bridge leaves its configuration
    there, Megatron-LM its arguments in ``common.pt``, which is looked through without being unpickled."""
    if (path / "run_config.yaml").is_file():
        return True
    try:
        with zipfile.ZipFile(path / "common.pt") as archive:
            return any(b"argparse" in archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    except (OSError, zipfile.BadZipFile):
        return False


def write_info(path: Path, info: CheckpointInfo) -> None:
    """Put ``info`` into the checkpoint folder ``path``, as the last file of a save."""
    replace_text(path / INFO, json.dumps(dataclasses.asdict(info), indent=2) + "\n")


def effective_configuration(options: Mapping[str, Any], world_size: int) -> str:
    """The content of ``config.yaml``: every option's value, which ``--yaml-cfg`` reads again, and how many ranks."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return yaml.safe_dump({**plain, "world_size": world_size}, sort_keys=False)


def copy_tokenizer(model: Path, target: Path) -> bool:
    """Copy the files of a tokenizer, and nothing else, into the folder ``target``; whether there were any.

    ``model`` is the tokenizer's folder, or a file in it. A SentencePiece model gets the name that transformers knows.
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
    """Write a small text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
