"""How bad input is refused: in one line, which tests look at."""

import contextlib

import pytest

from mft_megatron.errors import InputError


def refusal(process) -> str:
    """The one line with which a command refused bad input; checks that it is one and that nothing else was said."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0, process.stdout
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    return lines[0]


def refused_call(function, *arguments, **named) -> str:
    """The one line with which a function refuses its arguments."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def refused(*words):
    """A block that must raise an ``InputError`` of one line that contains all of ``words``."""
    with pytest.raises(InputError) as caught:
        yield
    for each in words:
        assert each in str(caught.value)
    assert "\n" not in str(caught.value)
