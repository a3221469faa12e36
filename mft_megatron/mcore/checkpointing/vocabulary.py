"""Weights whose rows are tokens: a checkpoint may have more rows than the vocabulary, as its parallel layout asked."""

from torch import Tensor

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
VOCABULARY_WEIGHTS = (EMBEDDING, OUTPUT_LAYER)


def has_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a weight of a checkpoint has the expected shape, apart from the padding of a vocabulary."""
    padded = name in VOCABULARY_WEIGHTS and shape[0] >= expected[0] and shape[1:] == expected[1:]
    return padded or shape == expected


def without_padding(name: str, weight: Tensor, vocab_size: int) -> Tensor:
    """Take the rows of a weight [rows, …] that stand for tokens; any other weight is returned whole."""
    return weight[:vocab_size] if name in VOCABULARY_WEIGHTS else weight
