"""The chat format that a model was trained with, which travels from the data set to checkpoints and exports.

::

    formats of the tasks ─► Jinja text by task, in the ledger ─► the one of most chats, in each checkpoint ─► export
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from mft_megatron.data.storage.ledger import JsonObject, Ledger, TaskEntry
from mft_megatron.data.tokenizers.tokenizer import Tokenizer

from .formats import ChatFormat
from .jinja_renderer import TemplateError, renderer

_QUESTION = {"role": "user", "content": "Q"}
_SYSTEM = {"role": "system", "content": "S"}


@dataclasses.dataclass(frozen=True)
class TrainedFormat:
    """The chat format of most chats of a data set.

    Attributes:
        name: as ``--chat-template`` names it; "template" is the one that came with the tokenizer.
        source: text of the Jinja template that writes conversations so; ``None`` where there was no chat.
        others: names of other formats and the tasks that have them.
    """

    name: str
    source: str | None
    others: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> str:
        """The name as a user knows it."""
        return _words(self.name)

    @property
    def difference(self) -> str:
        """Words about tasks that have another format, and how to make them one; empty where there are none."""
        if not self.others:
            return ""
        listed = " and ".join(f"{', '.join(tasks)} with {_words(name)}" for name, tasks in self.others.items())
        return (
            f"tasks were trained with different chat formats: most chats with {self.words}, {listed}; a server has "
            "one, so preprocess all tasks with one --chat-template"
        )


def difference_notes(ledger: Ledger) -> list[str]:
    """Write the line of :attr:`TrainedFormat.difference` for a data set; none where there is nothing to say."""
    trained = trained_format(ledger)
    return [trained.difference] if trained is not None and trained.difference else []


def _words(name: str) -> str:
    return "the tokenizer's template" if name == "template" else name


def served_source(style: ChatFormat, tokenizer: Tokenizer, add_bos: bool) -> str:
    """Write the Jinja template of a format as a server needs it.

    Args:
        style: the format.
        tokenizer: of the data set.
        add_bos: samples begin with the bos token, also where the format does not write it; then the template does.
    """
    source, bos = style.source, tokenizer.bos_token
    if not add_bos or bos is None:
        return source
    variables = {"eos_token": tokenizer.end_of_text, "bos_token": bos}
    begins = set()
    for messages in ([_QUESTION], [_SYSTEM, _QUESTION]):
        try:
            begins.add(renderer(source).render(messages, None, variables, prompt=True).startswith(bos))
        except TemplateError:  # it may require a system turn, or have no place for one
            continue
    if begins == {True}:
        return source
    if begins == {False}:
        # the line break after a comment is not written, and the template still begins a line
        return f"{{{{- bos_token }}}}{{# as in the data #}}\n{source}"
    text = source.removesuffix("\n")  # which is not written at the end of a template
    return (
        f"{{% set written %}}\n{text}{{% endset %}}"
        '{{- "" if written.startswith(bos_token) else bos_token }}{{- written }}'
    )


def chat_sources(
    tasks: Sequence[TaskEntry], styles: Mapping[str, ChatFormat], tokenizer: Tokenizer, add_bos: bool
) -> list[JsonObject]:
    """List for the ledger the templates of tasks that have chats: ``name``, ``source`` and ``tasks`` of each.

    Args:
        tasks: of the data set.
        styles: the format of each task, by name of the task.
        tokenizer: of the data set.
        add_bos: samples begin with the bos token.
    """
    entries: dict[str, JsonObject] = {}
    for task in tasks:
        if task.chats:
            source = served_source(styles[task.name], tokenizer, add_bos)
            entry = entries.setdefault(source, {"name": styles[task.name].name, "source": source, "tasks": []})
            entry["tasks"].append(task.name)
    return list(entries.values())


def has_tokenized_files(task: TaskEntry) -> bool:
    """Whether files of a task were tokens already, which may be chats in a format that is not known."""
    return any(source.path.endswith(".idx") for source in task.sources)


def merged_sources(ledgers: Sequence[Ledger], names: Sequence[str]) -> list[JsonObject] | None:
    """Merge the templates of several data sets; ``None`` where one of them was made before they were recorded.

    Args:
        ledgers: of the data sets.
        names: tasks of the merged data set, in their order.
    """
    entries: dict[str, JsonObject] = {}
    for ledger in ledgers:
        if "sources" not in ledger.chat_template:
            return None
        for entry in ledger.chat_template["sources"]:
            merged = entries.setdefault(entry["source"], {**entry, "tasks": []})
            merged["tasks"] = sorted({*merged["tasks"], *entry["tasks"]}, key=names.index)
    return sorted(entries.values(), key=lambda entry: names.index(entry["tasks"][0]))


def trained_format(ledger: Ledger) -> TrainedFormat | None:
    """Choose the format of most chats of a data set.

    Returns:
        the format; ``None`` where it is not known, because the data set was made before it was recorded, or has no
        chats but files that were tokens already.
    """
    sources = ledger.chat_template.get("sources")
    if sources is None or (not sources and any(map(has_tokenized_files, ledger.tasks))):
        return None
    if not sources:
        return TrainedFormat(ledger.chat_template["name"], None)
    chats = {task.name: task.chats or 0 for task in ledger.tasks}
    chosen = max(sources, key=lambda entry: sum(chats.get(task, 0) for task in entry["tasks"]))
    others: dict[str, list[str]] = collections.defaultdict(list)
    for entry in sources:
        if entry is not chosen:
            others[entry["name"]] += entry["tasks"]
    return TrainedFormat(chosen["name"], chosen["source"], dict(others))
