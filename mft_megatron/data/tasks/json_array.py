"""The records of a file that holds one JSON array, one by one, so that the file is never in memory as a whole."""

import itertools
import re
from collections.abc import Iterable, Iterator

from mft_megatron.errors import InputError

_SPACE = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
# up to the next bracket, or to a string that does not end in the buffer
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^"{}\[\]]*)*', re.DOTALL)
# up to the end of a string, or to a backslash at the end of the buffer
_TO_QUOTE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def starts_with_array(blocks: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether content is a JSON array, told by its first character, and the whole content again.

    Args:
        blocks: the content.
    """
    read = b""
    for block in blocks:
        read += block
        if len(read) >= len(BOM) and read.removeprefix(BOM).lstrip(_SPACE):
            break
    return read.removeprefix(BOM).lstrip(_SPACE)[:1] == b"[", itertools.chain([read] if read else [], blocks)


def items_of_array(blocks: Iterable[bytes], path: str) -> Iterator[bytes]:
    """Cut a JSON array into its items.

    Brackets and strings are followed; whether an item is JSON is told when it is parsed. Values between objects, such
    as numbers, are one item together, so that none is passed over. Commas are not counted.

    Args:
        blocks: content that begins with an array.
        path: of the file, for error messages.

    Raises:
        InputError: the array has no end, or something follows it.
    """
    buffer = bytearray()  # begins with an item that has no end yet, or with what is between two items
    position = depth = items = 0  # scanned bytes of the buffer, open brackets, items that were given
    in_string = ended = False
    for block in blocks:
        buffer += block
        while not ended:
            found = (_TO_QUOTE if in_string else _TO_BRACKET).match(buffer, position)
            position = position if found is None else found.end()
            character = bytes(buffer[position : position + 1])
            if character in (b"", b"\\"):
                break  # the next block goes on from here
            position += 1
            if character == b'"':
                in_string = not in_string
                continue
            before, depth = depth, depth + (1 if character in b"[{" else -1)
            if before == 1:  # an item begins, or the array ends
                item = bytes(buffer[: position - 1]).strip(_SPACE + b",")
                taken = position - 1 if depth else position
            elif depth == 1:  # an item ends, or the array begins
                item = bytes(buffer[:position]) if before else b""
                taken = position
            else:
                continue
            if item:
                items += 1
                yield item
            del buffer[:taken]
            position -= taken
            ended = depth == 0
        if ended and buffer.strip(_SPACE):
            raise InputError(f"{path}: something follows the end of its array; make the file again")
    if not ended:
        raise InputError(f"{path}: cut off, its array has no end after record {items}; make the file again")
