"""Rendering Jinja chat templates, which are compiled once a process."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

# a message as in OpenAI's API; templates read any of its keys
Message = dict[str, Any]


class TemplateError(Exception):
    """A template that cannot be compiled or refuses a conversation; the message is the template's or Jinja's."""


class Renderer:
    """A compiled template.

    Attributes:
        tags: whether it encloses the assistant's text in ``{% generation %}`` tags.
    """

    def __init__(self, source: str):
        """Compile a template.

        Raises:
            TemplateError: the source is no Jinja template; the message names the line.
        """
        # 0.1 s of CPU in each command and worker, which data without templates need not spend
        import jinja2

        from .jinja_environment import TemplateEnvironment

        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # for example nested too deeply
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        self.tags = self._environment.generation_tags > 0

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, object]] | None,
        variables: Mapping[str, str],
        prompt: bool = False,
        marks: tuple[str, str] | None = None,
    ) -> str:
        """Write a conversation as text.

        Args:
            messages: as in OpenAI's API.
            tools: that the conversation declares.
            variables: names of tokens, for example ``bos_token``.
            prompt: end with the beginning of an assistant turn (``add_generation_prompt``).
            marks: characters to write before and after each part that generation tags enclose.

        Raises:
            TemplateError: the template raised; the message is one line.
        """
        self._environment.generation_marks = marks
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **variables
            )
        except Exception as error:  # an expression of the template can raise any exception
            message = " ".join(str(error).split())
            raise TemplateError(message or type(error).__name__) from None


@functools.lru_cache(maxsize=16)
def renderer(source: str) -> Renderer:
    """Return the :class:`Renderer` of a template, compiled once a process."""
    return Renderer(source)
