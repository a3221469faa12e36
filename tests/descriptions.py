"""Descriptions of checkpoints that tests change, with the digest that makes them valid again."""

import json

from mft_megatron.run_folder.description import description_text


def description_of(file):
    """The content of the description ``file``, without its digest."""
    content = json.loads(file.read_text())
    content.pop("digest", None)
    return content


def redescribe(file, **changes):
    """Write the description ``file`` again with other values, as that of a checkpoint without hashes."""
    file.write_text(description_text({**description_of(file), "format_version": 3, "manifest": "", **changes}))
