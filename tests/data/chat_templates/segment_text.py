"""Segments as text that tests can compare."""

import itertools


def written(segments):
    """Write the sample's text, with names of special tokens in «» and supervised runs in ⟦⟧."""
    text = []
    for supervised, run in itertools.groupby(segments, lambda segment: segment.supervised):
        joined = "".join(f"«{segment.text}»" if segment.special else segment.text for segment in run)
        text.append(f"⟦{joined}⟧" if supervised else joined)
    return "".join(text)


def supervised_text(segments):
    """Write the supervised text alone."""
    return "".join(segment.text for segment in segments if segment.supervised)
