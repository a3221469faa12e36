"""Files that a run keeps beside its checkpoints, so that an export is complete."""

import shutil
from pathlib import Path

from mft_megatron.arguments.table import Arguments
from mft_megatron.parsing.links import refuse_odd_link
from mft_megatron.run_folder.names import HUGGINGFACE, TOKENIZER
from mft_megatron.run_folder.tokenizer import copy_tokenizer
from mft_megatron.training.run_log import RunLog

from .sources import Sources


def keep_source(folder: Path, arguments: Arguments, sources: Sources) -> None:
    """Copy the files kept of a model from Hugging Face into the run folder, so that an export has them."""
    if arguments.resume is None or not arguments.resume.info.source:
        return
    target = folder / HUGGINGFACE
    if arguments.starts_from_hf and sources.model is not None:
        sources.model.keep(target)
        return
    source = arguments.resume.path.parent / HUGGINGFACE
    if source.is_dir() and source.resolve() != target.resolve():
        for file in source.rglob("*"):
            refuse_odd_link(file)
        shutil.copytree(source, target, dirs_exist_ok=True)


def keep_tokenizer(folder: Path, model: str, log: RunLog) -> None:
    """Copy the tokenizer's files into the run folder, so that an export is complete; print a line if they are gone."""
    if not copy_tokenizer(Path(model), folder / TOKENIZER):
        log.print(f"the tokenizer {model} is gone: an export of this run will need --tokenizer-model")
