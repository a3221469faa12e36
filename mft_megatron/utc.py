"""Moments as text that sorts and is the same on all machines: UTC, ISO 8601, whole seconds."""

import datetime

FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def now() -> datetime.datetime:
    """The present moment."""
    return datetime.datetime.now(datetime.timezone.utc)


def text_of(moment: datetime.datetime) -> str:
    """A moment as text."""
    return moment.strftime(FORMAT)


def moment_of(text: str) -> datetime.datetime:
    """The moment that a text says.

    Raises:
        ValueError: it says none.
    """
    return datetime.datetime.strptime(text, FORMAT).replace(tzinfo=datetime.timezone.utc)
