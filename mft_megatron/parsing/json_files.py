"""Small JSON files of other programs."""

import json
from pathlib import Path
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer


def read_json_object(file: Path, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object, in UTF-8 whatever the locale.

    Args:
        file: to read.
        remedy: what the user can do about a damaged file, for the message.

    Raises:
        InputError: the file is a pointer of Git LFS, not JSON in UTF-8, or JSON of another kind.
        OSError: it cannot be read.
    """
    refuse_pointer(file)
    advice = "" if remedy is None else f"; {remedy}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}){advice}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object{advice}")
    return content
