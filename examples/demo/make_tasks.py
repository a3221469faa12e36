"""Five code tasks out of Python's own standard library, as JSONL.

```
modules ─ast─► functions, with the checks of their doctests and the statements that call them elsewhere
                   │    each function serves one task only; the rarest kind chooses first
                   ├─► function_to_usage       instruction / input / output
                   ├─► docstring_to_function   messages
                   ├─► function_to_docstring   chat_rounds
                   ├─► fim                     prompt / completion, prefix-suffix-middle
                   └─► completion              prompt / completion
```

No task's training samples give away another's validation samples. The sizes are unequal on purpose: the largest task
has fifteen times the samples of the smallest. The same interpreter, seed and options give the same bytes.
"""

import argparse
import ast
import builtins
import doctest
import json
import random
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

Record = dict[str, Any]


@dataclass
class Module:
    """One parsed file. ``names``: bound at its top level; ``imports``: modules that it imports under their own name."""

    name: str
    lines: list[str]
    tree: ast.Module
    names: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for statement in self.tree.body:
            self.names |= _bound_names(statement)
            if isinstance(statement, ast.Import):
                self.imports.update(alias.name for alias in statement.names if not alias.asname)

    def text(self, first_line: int, last_line: int) -> str:
        """Lines ``first_line`` … ``last_line`` (from 1, both included), dedented, with a newline at the end."""
        return textwrap.dedent("\n".join(self.lines[first_line - 1 : last_line])).rstrip() + "\n"


@dataclass(frozen=True)
class Function:
    """A function or method whose dedented ``source`` parses on its own; ``node`` is its tree.

    ``docstring`` is the cleaned text or empty. ``test`` holds the docstring's examples as assertions, or nothing.
    ``calls`` are statements of other modules that call the function through its module's name.
    """

    module: str
    name: str
    source: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    docstring: str
    test: str
    calls: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """Source lines with their ends."""
        return re.findall(".*\n", self.source)  # splitlines() would also cut at form feeds, and ast does not

    @property
    def signature(self) -> str:
        """Source from the first decorator to the colon."""
        return "".join(self.lines[: self.node.body[0].lineno - 1])

    @property
    def source_without_docstring(self) -> str:
        """Source with the docstring cut out."""
        if not self.docstring:
            return self.source
        expression = self.node.body[0]
        return "".join(self.lines[: expression.lineno - 1] + self.lines[expression.end_lineno :])


def read_modules(folder: Path) -> list[Module]:
    """Every module below ``folder`` that parses, in the order of its path."""
    modules = []
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        modules.append(Module(".".join(part for part in parts if part != "__init__"), text.split("\n"), tree))
    return modules


def read_calls(modules: list[Module]) -> dict[str, list[str]]:
    """``module.function`` → the distinct short statements of other modules that call it, in reading order."""
    calls: dict[str, list[str]] = {}
    for module in modules:
        for statement in ast.walk(module.tree):
            if not isinstance(statement, ast.Assign | ast.Expr) or statement.end_lineno - statement.lineno > 3:
                continue
            called = statement.value.func if isinstance(statement.value, ast.Call) else None
            if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name):
                continue
            code = module.text(statement.lineno, statement.end_lineno).rstrip()
            # A line may hold more than the statement: `if quiet: m.f()`, or two around a semicolon.
            if called.value.id in module.imports and ast.unparse(statement) == _unparse_or_nothing(code):
                found = calls.setdefault(f"{called.value.id}.{called.attr}", [])
                if code not in found:
                    found.append(code)
    return calls


def read_functions(modules: list[Module], max_chars: int) -> list[Function]:
    """Functions and methods of three lines or more and at most ``max_chars`` characters; of equal code, the first."""
    calls = read_calls(modules)
    functions: dict[str, Function] = {}
    for module in modules:
        for names, definition in _definitions(module.tree, ()):
            first_line = min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])
            if definition.end_lineno - first_line < 2 or definition.body[0].lineno == definition.lineno:
                continue
            source = module.text(first_line, definition.end_lineno)
            docstring = ast.get_docstring(definition) or ""
            if len(source) > max_chars or not (_is_plain(source) and _is_plain(docstring)):
                continue
            try:
                [node] = ast.parse(source).body
            except SyntaxError:  # a string over several lines that reaches further left than its function
                continue
            function = Function(
                module=module.name,
                name=".".join(names),
                source=source,
                node=node,
                docstring=docstring,
                test=test_from_doctests(docstring, names[-1], module),
                calls=tuple(calls.get(f"{module.name}.{names[-1]}", ())) if len(names) == 1 else (),
            )
            functions.setdefault(function.source_without_docstring, function)
    return list(functions.values())


def test_from_doctests(docstring: str, name: str, module: Module) -> str:
    """The examples of a docstring as assertions: ``>>> f(1)`` / ``2`` becomes ``assert f(1) == 2``.

    A shown value that is no Python literal is compared as ``repr``. The first example that cannot be asserted on (it
    prints, raises, or shows a value in part) ends the test, because later ones may build on it.

    Args:
        docstring: the cleaned docstring.
        name: of the function; at least one assertion must mention it.
        module: the module of the examples; they may use its top-level names without defining them.

    Returns:
        the test with the import it needs, or nothing.
    """
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:
        return ""
    lines: list[str] = []
    for example in examples:
        code, shown = example.source.strip(), example.want.strip()
        if not shown:
            lines.append(code)
            continue
        assertion = "" if example.exc_msg or example.options else _assertion(code, shown)
        if not assertion:
            break
        lines.append(assertion)
    test = "\n".join(lines)
    if not re.search(rf"^assert .*\b{re.escape(name)}\b", test, re.MULTILINE):
        return ""
    nodes = list(ast.walk(ast.parse(test)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    made = set().union(*(_bound_names(node) for node in nodes))
    needed = {name for name in used - made if name in module.names or not hasattr(builtins, name)}
    if not needed <= module.names:
        return ""
    return (f"from {module.name} import {', '.join(sorted(needed))}\n\n" if needed else "") + test


def _assertion(code: str, shown: str) -> str:
    """``code`` shows ``shown`` as an assertion; nothing where the shown value is printed, abridged or an address."""
    if "..." in shown or " at 0x" in shown:
        return ""
    value = _expression(code)
    if value is None or (isinstance(value, ast.Call) and ast.unparse(value.func) == "print"):
        return ""
    try:
        expected = _expression(repr(ast.literal_eval(shown)))
    except (SyntaxError, ValueError):
        if not shown.startswith("<") and not isinstance(_expression(shown), ast.Call | ast.List | ast.Tuple | ast.Dict):
            return ""
        value, expected = ast.Call(ast.Name("repr"), [value], []), ast.Constant(shown)
    same = (
        ast.Is()
        if isinstance(expected, ast.Constant) and any(expected.value is v for v in (None, True, False))
        else ast.Eq()
    )
    return ast.unparse(ast.Assert(ast.Compare(value, [same], [expected]), None))


def _expression(code: str) -> ast.expr | None:
    try:
        return ast.parse(code, mode="eval").body
    except SyntaxError:
        return None


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a statement or expression binds by itself, not by its contents."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    return {node.arg} if isinstance(node, ast.arg) else set()


def _definitions(
    parent: ast.Module | ast.ClassDef, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (*names, node.name), node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node, (*names, node.name))


def _unparse_or_nothing(code: str) -> str:
    try:
        return ast.unparse(ast.parse(code))
    except SyntaxError:
        return ""


def _is_plain(text: str) -> bool:
    """Whether UTF-8 can hold it (an escape can make half a surrogate pair) and it contains none of our markers."""
    return text.encode(errors="ignore").decode() == text and "<|" not in text and "```" not in text


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def make_completion(function: Function, rng: random.Random) -> Record | None:
    """Signature and docstring, or signature and first statement → the rest of the function."""
    body = function.node.body
    if len(body) < 2:
        return None
    cut = body[0].end_lineno
    if len(function.lines) - cut < 2:
        return None
    return {"prompt": "".join(function.lines[:cut]), "completion": "".join(function.lines[cut:])}


def make_fim(function: Function, rng: random.Random) -> Record | None:
    """One to eight lines out of the middle of a function, to be filled in between the lines before and after them."""
    lines = function.lines
    start = rng.randrange(1, len(lines) - 1)
    end = rng.randrange(start + 1, min(start + 8, len(lines) - 1) + 1)
    prefix, middle, suffix = ("".join(part) for part in (lines[:start], lines[start:end], lines[end:]))
    if not middle.strip():
        return None
    return {"prompt": f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>", "completion": middle}


def make_docstring_to_function(function: Function, rng: random.Random) -> Record | None:
    """A signature and what the function shall do → the function, without repeating the docstring."""
    if len(function.docstring) < 30 or len(function.node.body) < 2:
        return None
    request = rng.choice(
        [
            "Write this Python function.",
            "Implement the function below so that it does what the description says.",
            "Complete the Python function from its signature and description.",
        ]
    )
    return {
        "messages": [
            {"role": "user", "content": f"{request}\n\n{_fenced(function.signature)}\n\n{function.docstring}"},
            {"role": "assistant", "content": _fenced(function.source_without_docstring)},
        ]
    }


def make_function_to_docstring(function: Function, rng: random.Random) -> Record | None:
    """A function without its docstring → the docstring."""
    if len(function.docstring) < 30 or len(function.node.body) < 2:
        return None
    request = rng.choice(
        ["Write a docstring for this function.", "Document this function.", "What does this function do?"]
    )
    return {
        "chat_rounds": [
            {"role": "human", "content": f"{request}\n\n{_fenced(function.source_without_docstring)}"},
            {"role": "bot", "content": function.docstring},
        ]
    }


def make_function_to_usage(function: Function, rng: random.Random) -> Record | None:
    """A function → a test made of its doctests; where it has none, real calls of it from elsewhere in the library."""
    if function.test:
        instruction = f"Write a test for `{function.name}` from the module `{function.module}`."
        output = function.test
    elif function.calls:
        instruction = f"Show how `{function.module}.{function.name}` is called."
        output = "\n".join([f"import {function.module}\n", *rng.sample(function.calls, min(3, len(function.calls)))])
    else:
        return None
    return {"instruction": instruction, "input": function.source_without_docstring, "output": output}


@dataclass(frozen=True)
class Task:
    """How one task makes a record of a function (or declines), and how many samples it has by default."""

    make: Callable[[Function, random.Random], Record | None]
    samples: int


# In the order in which they choose: few functions have doctests or callers, many have a docstring, all have a body.
TASKS = {
    "function_to_usage": Task(make_function_to_usage, 120),
    "docstring_to_function": Task(make_docstring_to_function, 360),
    "function_to_docstring": Task(make_function_to_docstring, 600),
    "fim": Task(make_fim, 1000),
    "completion": Task(make_completion, 1800),
}


def strings_of(value: Any) -> Iterator[str]:
    """Every text of a record, in order; the roles of a conversation are not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)
    else:
        for key, item in value.items():
            if key != "role":
                yield from strings_of(item)


def assign_functions(
    functions: list[Function], samples: dict[str, int], max_chars: int, seed: int
) -> dict[str, list[Record]]:
    """Assign the functions to the tasks, each function once.

    Args:
        functions: in a fixed order, on which the result depends.
        samples: task → how many samples it may have; it gets fewer where the library has no more.
        max_chars: bound on the sum of all texts of one sample.
        seed: of the shuffles.

    Returns:
        task → its records, no two equal, in the order of ``TASKS``.
    """
    remaining = list(functions)
    tasks: dict[str, list[Record]] = {}
    for name, task in TASKS.items():
        rng = random.Random(f"{seed} {name}")
        rng.shuffle(remaining)
        if name == "function_to_usage":
            remaining.sort(key=lambda function: (not function.test, -min(3, len(function.calls))))  # the richest first
        records: dict[str, Record] = {}
        declined = []
        for function in remaining:
            record = task.make(function, rng) if len(records) < samples[name] else None
            if record is None or sum(map(len, strings_of(record))) > max_chars:
                declined.append(function)
            else:
                records.setdefault(json.dumps(record), record)
        tasks[name] = list(records.values())
        rng.shuffle(tasks[name])
        remaining = declined
    return tasks


def write_tasks(tasks: dict[str, list[Record]], folder: Path) -> dict[str, int]:
    """Write ``folder/TASK.jsonl`` for each task and return the files' sizes in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, records in tasks.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        sizes[name] = (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())
    return sizes


def print_tasks(tasks: dict[str, list[Record]], sizes: dict[str, int]) -> None:
    """A table of all tasks, largest first, and the shortest of the first ten samples of each."""
    names = sorted(tasks, key=lambda name: -len(tasks[name]))
    print(f"{'task':24}{'samples':>8}{'bytes':>10}{'mean chars':>12}")
    for name in names:
        characters = sum(len(text) for record in tasks[name] for text in strings_of(record))
        print(f"{name:24}{len(tasks[name]):8}{sizes[name]:10}{characters / max(1, len(tasks[name])):12.0f}")
    print(f"{'all':24}{sum(map(len, tasks.values())):8}{sum(sizes.values()):10}")
    for name in names:
        if tasks[name]:
            record = min(tasks[name][:10], key=lambda record: sum(map(len, strings_of(record))))
            print(f"\n── {name} " + "─" * max(0, 76 - len(name)))
            for key, value in record.items():
                for text in strings_of(value):
                    print(f"{key}:\n{textwrap.indent(text.rstrip(), '    ')}")


def _cap(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in TASKS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER with NAME one of {', '.join(TASKS)}")
    return name, int(number)


def main() -> None:
    """Parse the options, make the tasks, write and show them."""
    parser = argparse.ArgumentParser(description="Make five code tasks out of Python's standard library, as JSONL.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for one JSONL file per task")
    parser.add_argument("--source-dir", type=Path, help="take the modules of this folder (default: standard library)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply every task's number of samples by this")
    parser.add_argument(
        "--max-samples",
        type=_cap,
        action="append",
        default=[],
        metavar="NAME=N",
        help="samples of one task; repeatable",
    )
    parser.add_argument("--max-chars", type=int, default=800, help="longest sample, sum of its texts")
    options = parser.parse_args()

    samples = {name: round(task.samples * options.scale) for name, task in TASKS.items()} | dict(options.max_samples)
    modules = read_modules(options.source_dir or Path(sysconfig.get_paths()["stdlib"]))
    functions = read_functions(modules, options.max_chars)
    print(f"{len(functions)} functions of at most {options.max_chars} characters in {len(modules)} modules\n")
    tasks = assign_functions(functions, samples, options.max_chars, options.seed)
    print_tasks(tasks, write_tasks(tasks, options.output_dir))


if __name__ == "__main__":
    main()
