"""The data set and its order that a checkpoint continues with."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError


def refuse_other_data(arguments: Arguments, dataset: PackedDataset) -> None:
    """Check that the data set fits the checkpoint.

    Raises:
        InputError: another vocabulary, or, unless ``--finetune`` starts a new pass, another data set.
    """
    if arguments.resume is None:
        return
    path, info = arguments.resume.path, arguments.resume.info
    # models from Hugging Face may have more rows in their vocabulary than their tokenizers have tokens
    if info.vocab_size != dataset.vocab_size and not (info.source and info.vocab_size > dataset.vocab_size):
        raise InputError(
            f"{path}: made for a vocabulary of {info.vocab_size}, the data set {arguments.data.data_path} has "
            f"{dataset.vocab_size}; preprocess the data with the model's tokenizer"
        )
    if not arguments.weights_alone and info.dataset_hash != dataset.dataset_hash:
        raise InputError(
            f"--load {path}: saved while training on another data set than --data-path {arguments.data.data_path}; "
            "continue with that one, or start a new pass from these weights with --finetune"
        )


def model_vocab_size(arguments: Arguments, dataset: PackedDataset) -> int:
    """Rows of the model's vocabulary; a model from Hugging Face may have more than the data set's tokenizer."""
    return dataset.vocab_size if arguments.resume is None else arguments.resume.info.vocab_size


def order_version(arguments: Arguments, dataset: PackedDataset) -> int:
    """Version of the order of packs: a new run takes that of the data set, one that resumes keeps its checkpoint's."""
    if arguments.resume is None or arguments.weights_alone:
        return dataset.entry.order_version
    return arguments.resume.info.order_version
