"""Values of options of the conversion commands."""

import pytest

from mft_megatron.convert.commands.options import parse_size
from mft_megatron.errors import InputError


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1MB", "5 TB", "1.5GB"])
def test_texts_that_are_not_sizes(text):
    with pytest.raises(InputError, match="--max-shard-size"):
        parse_size(text)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "200MB", "64 kb")] == [5 * 10**9, 200 * 10**6, 64_000]
