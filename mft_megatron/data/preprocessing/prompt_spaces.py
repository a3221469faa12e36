"""Spaces that a tokenizer writes into the prompt of a chat, where a server tokenises the prompt as one text.

Tokenizers like those of Llama and Mistral write a space before a text, some also after each special token in it. A
sample has the same spaces in what is not supervised; what the model says begins without.
"""

from collections.abc import Sequence

from mft_megatron.data.records.segments import Segment
from mft_megatron.data.tokenizers.beginnings import never
from mft_megatron.data.tokenizers.tokenizer import Tokenizer


def with_prompt_spaces(segments: Sequence[Segment], tokenizer: Tokenizer, add_bos: bool) -> Sequence[Segment]:
    """Write the spaces of a prompt into the segments of a chat.

    Args:
        segments: of the whole sample.
        tokenizer: of the data set.
        add_bos: the sample begins with BOS also where its segments do not.
    """
    beginning = tokenizer.beginning
    if beginning.space is never:
        return segments
    written: list[Segment] = []
    opens = beginning.after_tokens or not add_bos  # the next text is written with a space
    for segment in segments:
        if segment.special and tokenizer.token_id(segment.text) is not None:
            opens = beginning.after_tokens
        elif segment.text and opens:
            opens = False
            begun = None if segment.weight else beginning.text(segment.text, markup=False)
            segment = segment if begun is None else segment._replace(text=begun)
        written.append(segment)
    return written
