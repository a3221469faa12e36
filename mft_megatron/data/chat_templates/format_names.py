"""Names of chat formats, as ``--chat-template`` takes them and as messages show them."""

TOKENIZERS_TEMPLATE = "template"  # the template that comes with the tokenizer


def shown_format(name: str) -> str:
    """Name a format as messages do: by its option, or as the tokenizer's template, which no option names."""
    return "the tokenizer's chat template" if name == TOKENIZERS_TEMPLATE else f"--chat-template {name}"
