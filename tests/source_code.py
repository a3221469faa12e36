"""Source code that tests tokenise and train on, written from a seed: the same on every machine and Python."""

import random
import textwrap

NOUNS = (
    *("name", "value", "path", "line", "text", "item", "index", "count", "parser", "action", "option", "argument"),
    *("group", "usage", "prefix", "format", "default", "pattern", "string", "message", "width", "indent", "section"),
    *("file", "folder", "owner", "source", "target", "archive", "entry", "buffer", "offset", "length", "mode", "user"),
    *("node", "child", "parent", "field", "type", "context", "scope", "module", "visitor", "number", "token", "error"),
)
VERBS = (
    *("get", "set", "add", "find", "make", "read", "write", "copy", "move", "check", "parse", "format", "join"),
    *("split", "open", "close", "register", "remove", "visit", "convert", "match", "expand", "update", "resolve"),
)
ADJECTIVES = (
    *("first", "last", "optional", "required", "positional", "empty", "unknown", "default", "current", "nested"),
    *("hidden", "long", "short", "invalid", "remaining", "possible", "previous", "whole", "raw", "explicit"),
)
ERRORS = ("ValueError", "TypeError", "KeyError", "OSError", "AttributeError")
STATEMENTS = (1, 1, 1, 1, 1, 2, 2, 3, 4, 12)
COMPARISONS = ("==", "!=", "<", ">=", "in", "not in", "is", "is not")


class Writer:
    """A writer of random functions; each call of a method writes on from the numbers before."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def function(self, method: bool = False) -> str:
        """Write a function of 2 to about 100 lines, half of them of fewer than 10."""
        name = self._choice(("", "", "_", "__")) + "_".join([self._choice(VERBS), *self._nouns(0, 2)])
        arguments = [*(["self"] if method else []), *dict.fromkeys(self._nouns(0, 4))]
        arguments += [f"{self._choice(ADJECTIVES)}={self._constant()}"] * self._happens(0.3)
        body = [f'"""{self._sentence()}"""'] * self._happens(0.25)
        body += self._block(self._choice(STATEMENTS))
        if not body[-1].startswith(("return", "raise")) and self._happens(0.6):
            body.append(f"return {self._expression()}")
        return f"def {name}({', '.join(arguments)}):\n" + _indented(body)

    def module(self, functions: int) -> str:
        """Write a module of this many functions, in classes and outside them."""
        parts = [f'"""{self._sentence()}\n\n{textwrap.fill(" ".join(self._sentences(6)), 79)}\n"""']
        parts.append("\n".join(f"import {noun}" for noun in dict.fromkeys(self._nouns(2, 6))))
        parts += [f"{noun.upper()} = {self._constant()}" for noun in self._nouns(1, 6)]
        while functions > 0:
            methods = min(self._below(9), functions)
            if methods:
                functions -= methods
                title = "".join(map(str.title, (self._choice(ADJECTIVES), *self._nouns(1, 2))))
                text = "\n\n".join(self.function(method=True) for _ in range(methods))
                parts.append(f'class {title}:\n    """{self._sentence()}"""\n\n{textwrap.indent(text, "    ")}')
            else:
                functions -= 1
                parts.append(self.function())
        return "\n\n\n".join(parts) + "\n"

    def _block(self, statements, depth=0):
        """Write the lines of a block."""
        lines = []
        for _ in range(statements):
            kind = self._random.random()
            if kind < 0.1:
                lines.append(f"# {self._sentence().lower()}"[: 75 - 4 * depth])
            if kind < 0.25 and depth < 3:
                lines += [f"if {self._condition()}:", *_indented_lines(self._block(1 + self._below(3), depth + 1))]
                if self._happens(0.3):
                    lines += ["else:", *_indented_lines(self._block(1 + self._below(2), depth + 1))]
            elif kind < 0.35 and depth < 3:
                noun = self._choice(NOUNS)
                block = self._block(1 + self._below(3), depth + 1)
                lines += [f"for {noun} in {self._call()}:", *_indented_lines(block)]
            elif kind < 0.4 and depth < 3:
                block = self._block(1 + self._below(2), depth + 1)
                failed = f'raise {self._choice(ERRORS)}(f"{self._words()}: {{{self._choice(NOUNS)}!r}}") from None'
                lines += ["try:", *_indented_lines(block), f"except {self._choice(ERRORS)}:", f"    {failed}"]
            elif kind < 0.55:
                lines.append(f"self.{'_' * self._below(2)}{self._choice(NOUNS)} = {self._expression()}")
            elif kind < 0.8:
                lines.append(f"{self._choice(NOUNS)} {self._choice(('=', '=', '+='))} {self._expression()}")
            else:
                lines.append(self._call())
        return lines

    def _condition(self):
        return f"{self._choice(NOUNS)} {self._choice(COMPARISONS)} {self._expression()}"

    def _expression(self):
        kind = self._random.random()
        if kind < 0.3:
            return self._call()
        if kind < 0.5:
            return f"self.{self._choice(NOUNS)}"
        if kind < 0.6:
            noun = self._choice(NOUNS)
            return f"[{noun} for {noun} in {self._choice(NOUNS)}s if {self._condition()}]"
        return self._constant() if kind < 0.8 else self._choice(NOUNS)

    def _call(self):
        owner = self._choice(("self", "self", *NOUNS))
        name = "_".join([self._choice(VERBS), *self._nouns(0, 1)])
        return f"{owner}.{'_' * self._below(2)}{name}({', '.join(self._nouns(0, 3))})"

    def _constant(self):
        constants = ("None", "True", "False", "[]", "()", "{}", str(self._below(1000)), f"'{self._words()}'")
        return self._choice(constants)

    def _words(self):
        return " ".join([self._choice(ADJECTIVES), self._choice(NOUNS)])

    def _sentence(self):
        words = f"{self._choice(VERBS)} the {self._words()} of {self._choice(ADJECTIVES)} {self._choice(NOUNS)}s"
        return words.capitalize() + "."

    def _sentences(self, most):
        return [self._sentence() for _ in range(1 + self._below(most))]

    def _nouns(self, least, most):
        return [self._choice(NOUNS) for _ in range(least + self._below(most - least + 1))]

    def _choice(self, options):
        return options[self._below(len(options))]

    def _below(self, end):
        return int(end * self._random.random())

    def _happens(self, probability):
        return self._random.random() < probability


def functions(seed: int, count: int) -> list[str]:
    """Write this many functions."""
    writer = Writer(seed)
    return [writer.function() for _ in range(count)]


def module(seed: int, functions: int) -> str:
    """Write a module of this many functions, about 600 characters each."""
    return Writer(seed).module(functions)


def _indented(lines):
    return "\n".join(_indented_lines(lines))


def _indented_lines(lines):
    return [f"    {line}" for line in lines]
