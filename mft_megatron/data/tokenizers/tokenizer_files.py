"""The chat template beside a tokenizer."""

from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer
from mft_megatron.parsing.json_files import read_json_object


def read_chat_template(folder: Path) -> str | None:
    """Read the chat template of a tokenizer's folder; ``None`` if it has none.

    It is in ``chat_template.jinja``, else in ``tokenizer_config.json``: one template, or "default" of several by name.

    Raises:
        InputError: a file cannot be read, or the template is not text.
    """
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if alone.is_file():
        refuse_pointer(alone)
        try:
            return alone.read_text(encoding="utf-8")
        except ValueError as error:
            raise InputError(f"{alone}: not UTF-8 ({error})") from None
    template = read_json_object(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{config}: chat_template is no text; put the template into {alone.name} beside it")
    return template
