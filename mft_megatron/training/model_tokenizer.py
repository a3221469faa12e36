"""Check that the data set was made with the tokenizer of the model that a run starts from.

By the ids of texts, not by name or bytes: one tokenizer can be written in several ways, and people add special tokens
to it for the data. If a text had other ids for the model than in the data, training would read the data as noise.
"""

from pathlib import Path

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.chat_templates.trained_format import trained_format
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.tokenizers.differences import tokenizer_difference
from mft_megatron.data.tokenizers.load import TOKENIZERS, load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.data.tokenizers.tokenizer_files import read_chat_template
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef
from mft_megatron.run_folder.names import HUGGINGFACE, TOKENIZER

FILES = {"HuggingFaceTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}


def check_model_tokenizer(arguments: Arguments, dataset: PackedDataset) -> str:
    """Compare the tokenizer that came with the model of ``--hf-checkpoint`` or ``--load`` with the data set's.

    Returns:
        a line for the log, empty if both are the same tokenizer.

    Raises:
        InputError: a text has different ids in the two, or the data set's tokenizer is not where it was, so that they
            cannot be compared.
    """
    if arguments.resume is None or arguments.resume.info.dataset_hash == dataset.dataset_hash:
        return ""
    folder, info = _model(arguments, arguments.resume)
    made_with, prefix = dataset.ledger.tokenizer, arguments.data.data_path
    if info.tokenizer.get("fingerprint") == made_with.fingerprint:
        return ""
    present = [kind for kind in TOKENIZERS if (folder / FILES[kind]).is_file()]
    unknown = f"whether {prefix} was made with the model's tokenizer is not known: "
    if not present:
        return f"{unknown}{folder} has no {' or '.join(FILES.values())}"
    try:
        model = load_tokenizer(made_with.type if made_with.type in present else present[0], folder)
    except InputError as error:
        return f"{unknown}{error}"
    if (model.type, model.fingerprint) == (made_with.type, made_with.fingerprint):
        return ""
    data = _data_tokenizer(arguments, dataset, folder)
    found = tokenizer_difference(model, data, ("the model", "the data"))
    if found is not None:
        raise InputError(
            f"{folder}: the model's tokenizer is another one than {prefix} was made with: {found}. Preprocess the data "
            f"with --tokenizer-type {model.type} --tokenizer-model {folder}; special tokens alone may be added to it"
        )
    names = sorted(data.special_tokens.keys() - model.special_tokens.keys())
    added = f"; it has more special tokens: {', '.join(names)}" if names else ""
    return f"the data set's tokenizer is another one than the model's in {folder}, with the same ids for texts{added}"


def chat_format_line(arguments: Arguments, dataset: PackedDataset) -> str:
    """A line for the log where the chats of the data set are written otherwise than the model was trained with.

    Returns:
        the line; empty where both are the same, or one of them has none or is not known.
    """
    trained = trained_format(dataset.ledger)
    if arguments.resume is None or arguments.resume.info.dataset_hash == dataset.dataset_hash:
        return ""
    folder, info = _model(arguments, arguments.resume)
    if trained is None or trained.source is None:
        return ""
    recorded = info.tokenizer.get("chat_template")
    try:
        before = read_chat_template(folder) if recorded is None else recorded["source"]
    except InputError:  # which matters to servers only
        return ""
    if before in (None, trained.source):
        return ""
    return (
        f"the chats of {arguments.data.data_path} are written as {trained.words}, and the model in {folder} has "
        "another chat template; exports of this run will have that of the data"
    )


def _model(arguments: Arguments, resume: CheckpointRef) -> tuple[Path, CheckpointInfo]:
    """The folder with the tokenizer of the model that a run starts from, and the description of the model."""
    start = arguments.base or resume
    if arguments.starts_from_hf or arguments.reads_hf:
        return start.path, start.info
    return start.path.parent / (TOKENIZER if start.info.tokenizer else HUGGINGFACE), start.info


def _data_tokenizer(arguments: Arguments, dataset: PackedDataset, model_folder: Path) -> Tokenizer:
    """Load the tokenizer that the data set was made with, from ``--tokenizer-model`` or from where it was then."""
    made_with, prefix = dataset.ledger.tokenizer, arguments.data.data_path
    path = arguments.data.tokenizer_model or made_with.model
    try:
        tokenizer = load_tokenizer(made_with.type, path)
    except InputError:
        tokenizer = None
    if tokenizer is None or tokenizer.fingerprint != made_with.fingerprint:
        raise InputError(
            f"{model_folder}: the model's tokenizer is not byte by byte the one that {prefix} was made with, and that "
            f"one is no longer at {path}, so that their ids cannot be compared; give its path with --tokenizer-model, "
            f"or preprocess the data with --tokenizer-model {model_folder}"
        )
    return tokenizer
