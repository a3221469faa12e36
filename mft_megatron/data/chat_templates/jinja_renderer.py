"""Jinja chat templates as Hugging Face tokenizers carry them: compiled once, rendered in a sandbox.

The environment is the one that such templates are written for (block trimming, loop controls, ``raise_exception``,
``strftime_now``, ``{% generation %}``), made with jinja2 alone: importing transformers takes a second in every worker
process. Tests hold it against transformers.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mft_megatron.data.tokenizers.tokenizer import SpecialToken

# what templates that ask for today's date are told: data must not depend on the day that they are made
_TODAY = datetime.datetime(2024, 7, 26)


class TemplateError(Exception):
    """A template that cannot be compiled, or that refuses a conversation; the message is its own."""


class Renderer:
    """A compiled template. ``tags``: it marks with ``{% generation %}`` what the assistant says."""

    def __init__(self, source: str):
        """
        Raises:
            TemplateError: the source is no Jinja template; the message names the line.
        """
        import jinja2

        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # nested too deeply, or not to be compiled for another reason
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        self.tags = self._environment.generation_tags > 0

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, str],
        prompt: bool = False,
        marks: tuple[str, str] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: as in OpenAI's API.
            tools: that the conversation declares.
            variables: names of tokens, such as ``bos_token``.
            prompt: end with what opens an assistant's turn (``add_generation_prompt``).
            marks: characters to write before and after each part that the generation tags enclose.

        Raises:
            TemplateError: the template raised; the message is one line.
        """
        self._environment.generation_marks = marks
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **variables
            )
        except Exception as error:  # whatever an expression of the template can raise
            message = " ".join(str(error).split())
            raise TemplateError(message or type(error).__name__) from None


@functools.lru_cache(maxsize=16)
def renderer(source: str) -> Renderer:
    """The :class:`Renderer` of a template, compiled once a process."""
    return Renderer(source)


def _environment():
    """A sandbox of its own for one template."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}`` writes what it encloses, between marks where these are asked for."""

        tags = frozenset({"generation"})

        def __init__(self, environment):
            super().__init__(environment)
            environment.extend(generation_tags=0, generation_marks=None)

        def parse(self, parser):
            line = next(parser.stream).lineno
            self.environment.generation_tags += 1
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

        def _enclose(self, caller):
            marks = self.environment.generation_marks
            return caller() if marks is None else caller().join(marks)

    class Namespace(jinja2.utils.Namespace):
        """Refuses private names: a template has no business with what Python keeps under them."""

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template must not set {name}")
            super().__setitem__(name, value)

    def namespace(*args, **attributes):
        made = Namespace()
        for name, value in dict(*args, **attributes).items():
            made[name] = value
        return made

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(str(message))

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: _TODAY.strftime(form),
        dict=lambda *args, **items: dict(*args, **items),
        namespace=namespace,
    )
    return environment


Message = dict[str, Any]


Span = tuple[int, int]  # first character and the one after the last


class Name(NamedTuple):
    """An occurrence of the name of a special token in rendered text."""

    start: int
    end: int
    text: str


@functools.lru_cache(maxsize=16)
def names_pattern(names: tuple[str, ...]) -> re.Pattern:
    """Any of some names, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def names_in(text: str, special_tokens: Mapping[str, SpecialToken]) -> Iterator[Name]:
    return (Name(*match.span(), match.group()) for match in names_pattern(tuple(special_tokens)).finditer(text))
