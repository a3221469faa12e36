"""The data set."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """A data set written by tools/preprocess_data.py."""

    data_path: str = option(
        None,
        "Prefix of the data set: its --output-prefix.",
        aliases=("--data_paths",),
        metavar="PREFIX",
        required="--data-path PREFIX: the --output-prefix given to tools/preprocess_data.py",
    )
    seq_length: int = option(
        None,
        "Tokens of a row; the data set must be packed for it. Not given: the one it is packed for.",
        at_least=1,
        required="--seq-length N: the length the data set is packed for",
    )
    tokenizer_type: str | None = option(
        None,
        "Checked against the data set's; may be omitted.",
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"),
    )
    tokenizer_model: str | None = option(
        None, "Checked against the data set's by content; may be omitted.", metavar="PATH"
    )
