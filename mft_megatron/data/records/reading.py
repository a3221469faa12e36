"""Findings in one record while it is read, beside its conversation."""

from collections.abc import Mapping


class Reading:
    """Findings in one record; most records have none, so the empty tuples are shared.

    Attributes:
        unread: paths of keys that nothing reads, such as ``topic`` or ``messages[].topic``; a path may be there twice.
        kinds: of :data:`~.notes.NOTES`, one for each time that it was seen.
        tools: declared inside system turns, each list with its position in the record.
    """

    unread: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    tools: tuple[tuple[str, tuple[Mapping[str, object], ...]], ...] = ()
