"""The Jinja environment that chat templates are written for: Hugging Face's, without importing transformers.

It has block trimming, loop controls, ``raise_exception``, ``strftime_now`` and ``{% generation %}``, in a sandbox. It
uses jinja2 alone because importing transformers takes a second in every worker process; tests compare it with
transformers.
"""

import datetime
import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# the result of strftime_now in templates: data must not depend on the day on which they are made
TODAY = datetime.datetime(2024, 7, 26)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Environment of one template.

    Attributes:
        generation_tags: number of ``{% generation %}`` tags that were compiled.
        generation_marks: characters to write before and after the text that these tags enclose; ``None`` for none.
    """

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True)
        self.generation_tags = 0
        self.generation_marks: tuple[str, str] | None = None
        self.add_extension(_Generation)
        self.add_extension(loopcontrols)
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=TODAY.strftime,
            dict=lambda *args, **items: dict(*args, **items),
            namespace=_namespace,
        )


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` writes the text that it encloses, between the environment's marks."""

    tags = {"generation"}  # noqa: RUF012
    environment: TemplateEnvironment

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.generation_tags += 1
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        marks = self.environment.generation_marks
        return caller() if marks is None else caller().join(marks)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that refuses private names, under which Python keeps its own attributes."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template must not set {name}")
        super().__setitem__(name, value)


def _namespace(*args: Any, **attributes: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*args, **attributes).items():
        namespace[name] = value
    return namespace


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
