"""The data set."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """A data set written by tools/preprocess_data.py."""

    data_path: str | None = option(
        None, "Prefix of the data set: its --output-prefix.", type=str, aliases=("--data_paths",), metavar="PREFIX"
    )
    seq_length: int | None = option(
        None,
        "Tokens of a row; the data set must be packed for it. Not given: the one it is packed for.",
        type=int,
        at_least=1,
    )
    tokenizer_type: str | None = option(
        None,
        "Checked against the data set's; may be left out.",
        type=str,
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"),
    )
    tokenizer_model: str | None = option(
        None, "Checked against the data set's by content; may be left out.", type=str, metavar="PATH"
    )
