"""The description of a checkpoint, which is read before any weight.

It protects itself: its last entry is a digest of the others, so a description that was edited or damaged is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mft_megatron.common_state import read_args, read_common
from mft_megatron.errors import InputError
from mft_megatron.lora import Lora
from mft_megatron.parsing.typed_json import from_json, parse_json

from .file_hash import digest
from .manifest import DamagedCheckpointError
from .names import INFO
from .replace_text import replace_text

# Version 2 stores optimizer states by weight, independent of the optimizer; of version 1 only weights can be loaded.
# Version 3 names the order of the data that the run follows, and its normalisation.
# Version 4 has hashes of all files, itself included.
FORMAT_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)
_DIGEST = "digest"
# ``source`` of a model from Megatron-LM that no Hugging Face architecture can express.
OF_NO_FAMILY = "Megatron-LM"


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
        manifest: digest of the manifest, which has the hashes of all other files; empty where there is none, as in
            format versions before 4.
        options: the options of the run that change its numbers, by field, with ``world_size``; empty where a
            checkpoint does not say.
        versions: releases of Python and of packages that may change numbers, by name; empty likewise.
        evaluation_due: whether the evaluation of its step is still to be made, because a signal interrupted it.
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
    manifest: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluation_due: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def is_converted(self) -> bool:
        """Whether it was converted from a Hugging Face model; no run has trained it."""
        return self.source != "" and self.dataset_hash == ""

    @property
    def from_hugging_face(self) -> bool:
        """Whether an export copies the configuration of the Hugging Face model that it came from."""
        return self.source not in ("", OF_NO_FAMILY)


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
    """The folder and the description of a checkpoint, or of a Hugging Face model that is read like one.

    Attributes:
        path: the folder.
        info: the description.
        instead_of: what is wrong with each newer checkpoint of the run folder, if this is not the newest.
    """

    path: Path
    info: CheckpointInfo
    instead_of: tuple[str, ...] = ()


def read_info(path: Path, option: str = "--load") -> CheckpointInfo:
    """Read the description of the checkpoint in ``path``.

    Raises:
        DamagedCheckpointError: it is missing (an unfinished save), or unreadable.
        InputError: it has another version, or another program wrote the checkpoint.
    """
    file = path / INFO
    try:
        content = parse_json(file)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        version = content.get("format_version", FORMAT_VERSION)
        if version not in READABLE_VERSIONS:  # before its fields, which may be others
            known = ", ".join(map(str, READABLE_VERSIONS))
            raise InputError(f"{file}: format version {version}, this program reads {known}")
        fields = {name: value for name, value in content.items() if name != _DIGEST}
        info = from_json(CheckpointInfo, fields)
        if info.lora is not None:
            Lora.from_dict(info.lora)
        if version >= 4 and _DIGEST not in content:
            raise ValueError("it has no digest")
        if _DIGEST in content and file.read_bytes() != description_text(fields).encode():
            raise DamagedCheckpointError(f"{file}: changed since it was written: its digest is another; restore it")
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
    replace_text(path / INFO, description_text(dataclasses.asdict(info)))


def description_text(content: dict[str, Any]) -> str:
    """The text of a description with this content, and the digest of it."""
    own = digest(json.dumps(content).encode())
    return json.dumps({**content, _DIGEST: own}, indent=2) + "\n"
