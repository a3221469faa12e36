"""Comparison of what a server sends with what was trained: the chat template, stop tokens, and prompts id by id.

::

    checkpoint or ledger ─► template, stop tokens ─┐
    folder ─► transformers' tokenizer ─────────────┼─► equal, or both texts at the first difference
    ledger ─► examples, stored samples ────────────┘
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mft_megatron.convert.huggingface.chat_files import stop_tokens_in
from mft_megatron.convert.huggingface.model_folder import GENERATION
from mft_megatron.data.chat_templates.jinja_environment import TODAY
from mft_megatron.data.chat_templates.trained_format import TrainedFormat
from mft_megatron.data.storage.arrays import check_files
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import Ledger, TaskEntry
from mft_megatron.errors import InputError

from .finding import Finding
from .prompts import ServedTokenizer, render

_TOOL = {"type": "function", "function": {"name": "f", "description": "D", "parameters": {"type": "object"}}}
_ASKED = {"role": "user", "content": "Question?"}
_ROUND = [_ASKED, {"role": "assistant", "content": "Answer."}]
# conversations that templates write differently, with what is declared
_CONVERSATIONS: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None], ...] = (
    ([_ASKED], None),
    ([{"role": "system", "content": "System."}, _ASKED], None),
    ([*_ROUND, _ASKED], None),
    ([_ASKED], [_TOOL]),
)
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# tokens of a document's beginning that are compared
_BEGINNING = 16
# characters or tokens that are shown before and after a difference
_BEFORE, _AFTER = 12, 28


def template_finding(tokenizer: ServedTokenizer, trained: TrainedFormat | None, where: str) -> Finding:
    """Compare the chat template of a folder with the one that was trained.

    Args:
        tokenizer: of the folder.
        trained: the chat format that was trained; ``None`` where it is not known.
        where: checkpoint or data set that records it.
    """
    subject = "trained chat format"
    if trained is None:
        return Finding("note", subject, f"{where} does not record it: its data are older, or were tokens already")
    if trained.source is None:
        return Finding("ok", subject, f"no chat was trained ({where})")
    own = tokenizer.chat_template
    if not own:
        return Finding(
            "wrong", subject, f"{where} has chats ({trained.words}), the folder has no template; export again"
        )
    if own == trained.source:
        return Finding("ok", subject, f"{trained.words}, as in {where}")
    for messages, tools in _CONVERSATIONS:
        served, expected = (_render_or_refusal(tokenizer, messages, tools, text) for text in (None, trained.source))
        if served != expected:
            return Finding(
                "wrong", subject, f"{where} has {trained.words}: {_first_difference(served, expected)}; export again"
            )
    return Finding("ok", subject, f"{trained.words}, written as in {where}")


def stop_finding(folder: Path, stops: Sequence[int], where: str) -> Finding:
    """Check that a folder has every stop token that was trained; ``where`` is the checkpoint or data set."""
    subject = "trained stop tokens"
    try:
        listed = stop_tokens_in(folder)
    except InputError as error:
        return Finding("wrong", subject, f"not compared with {where}: {error}")
    lacking = [stop for stop in stops if stop not in listed]
    if lacking:
        return Finding(
            "wrong",
            subject,
            f"{GENERATION} lacks {', '.join(map(str, lacking))}, which ends answers of {where}; add to eos_token_id",
        )
    return Finding("ok", subject, f"all of {where}")


def prompt_findings(tokenizer: ServedTokenizer, prefix: str, ledger: Ledger) -> Iterator[Finding]:
    """Compare the prompts of each task's examples, as a server sends them, with the stored samples.

    Args:
        tokenizer: of the folder.
        prefix: of the data set.
        ledger: of the data set.

    Yields:
        a finding for each task; the first difference is shown.

    Raises:
        InputError: a file of the data set is missing or damaged.
    """
    check_files(prefix, ledger.arrays, hashes=False)
    ids, masks = (IndexedDataset(f"{prefix}_{name}") for name in ("input_ids", "loss_mask"))
    first = 0
    for task in ledger.tasks:
        examples = [example["sample"] for example in task.examples]
        samples = {index: (ids[first + index], masks[first + index]) for index in examples}
        yield _prompts_of(tokenizer, task, samples)
        first += task.kept


def _prompts_of(
    tokenizer: ServedTokenizer, task: TaskEntry, samples: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> Finding:
    subject = f"prompts of {task.name}"
    if not task.examples:
        return Finding("note", subject, "the data set has no example of them, so that they are not compared")
    tokens = 0
    dated = False
    for example in task.examples:
        stored, mask = samples[example["sample"]]
        try:
            served, varies = served_ids(tokenizer, example)
        except Exception as error:  # a template is a program, which may raise anything
            return Finding(
                "wrong", subject, f"sample {example['sample']}: cannot be rendered ({' '.join(str(error).split())})"
            )
        if "document" in example:
            # the end of the text is cut, so its last tokens may be others
            served = served[: min(_BEGINNING, max(1, len(served) - 4))]
            trained = stored[: len(served)].tolist()
        else:
            trained = stored[: int(np.argmax(mask))].tolist()
        if served != trained:
            return Finding(
                "wrong", subject, f"sample {example['sample']}: {difference_of_ids(tokenizer, served, trained)}"
            )
        tokens, dated = tokens + len(served), dated or varies
    text = f"{len(task.examples)} prompts, {tokens:,} tokens: a server sends what was trained"
    if dated:
        return Finding("note", subject, f"{text} but for the date of the day, which was {TODAY:%d %b %Y} in the data")
    return Finding("ok", subject, text)


def served_ids(tokenizer: ServedTokenizer, example: Mapping[str, Any]) -> tuple[list[int], bool]:
    """Encode the prompt of an example as a server does.

    Returns:
        ids, and whether they depend on the day, of which the ids of the data's day are returned.
    """
    if "messages" not in example:
        return list(tokenizer(example["prompt"] if "prompt" in example else example["document"])["input_ids"]), False
    messages, tools = example["messages"], example.get("tools")
    text = render(tokenizer, messages, tools, _on_the_day_of_the_data(tokenizer.get_chat_template(tools=tools)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids), text != render(tokenizer, messages, tools)


def _on_the_day_of_the_data(template: str) -> str:
    """Write the date of the data into a template instead of that of the day, which servers write."""
    return _DATE.sub(lambda call: json.dumps(TODAY.strftime(call[2])), template)


def difference_of_ids(tokenizer: ServedTokenizer, served: Sequence[int], trained: Sequence[int]) -> str:
    """Describe the first difference of two prompts, as text, or by the names of tokens where the texts are equal."""
    texts = [tokenizer.decode(list(ids)) for ids in (served, trained)]
    if texts[0] != texts[1]:
        return _first_difference(*texts)
    names = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in (served, trained)]
    return f"the same text in other tokens: {_first_difference(*names)}"


def _first_difference(served: Sequence[str], trained: Sequence[str]) -> str:
    """Show two texts, or lists of tokens, shortened around their first difference."""
    pairs = enumerate(zip(served, trained))  # noqa: B905  (one may be the beginning of the other)
    first = next((index for index, (one, other) in pairs if one != other), min(len(served), len(trained)))
    shown = []
    for text in (served, trained):
        start, end = max(0, first - _BEFORE), first + _AFTER
        part = repr(text[start:end])
        shown.append(f"{'…' if start else ''}{part}{'…' if end < len(text) else ''}")
    return f"a server sends {shown[0]}, trained was {shown[1]}"


def _render_or_refusal(
    tokenizer: ServedTokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template: str | None,
) -> str:
    """Render a conversation; a template that refuses it gives the words of its refusal."""
    try:
        if template is None:
            template = tokenizer.get_chat_template(tools=tools)
        return render(tokenizer, messages, tools, _on_the_day_of_the_data(template))
    except Exception as error:  # a template is a program, which may raise anything
        return f"(refused: {' '.join(str(error).split())})"
