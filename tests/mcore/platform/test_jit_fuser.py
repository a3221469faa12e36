"""Functions of Megatron-Core are compiled where torch.compile works, and otherwise run as they are."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from mft_megatron.mcore.platform import jit_fuser
from tests.ranks import run_on_ranks


def _compile(function):
    """Stand in for torch.compile: a function that says that it is the compiled one."""
    return lambda *arguments: ("compiled", function(*arguments))


@pytest.fixture
def functions(monkeypatch):
    monkeypatch.setattr(torch, "compile", _compile)
    monkeypatch.setattr(jit_fuser, "_compiles", True)


def test_functions_are_compiled_until_told_otherwise(functions):
    double = jit_fuser.fuse(lambda x: 2 * x)
    assert double(3) == ("compiled", 6)
    jit_fuser.enable(False)
    assert double(3) == 6
    jit_fuser.enable(True)
    assert double(3) == ("compiled", 6)


def test_a_function_within_another_is_part_of_it(functions, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert jit_fuser.fuse(lambda x: 2 * x)(3) == 6


def test_methods_are_decorated_too(functions):
    class Layer:
        @jit_fuser.fuse
        def double(self, x):
            """Double it."""
            return 2 * x

    assert Layer().double(3) == ("compiled", 6)
    assert Layer.double.__doc__ == "Double it."


def test_megatron_chooses_when_imported():
    """Functions that its modules have decorated are not changed by its disable_jit_fuser; with the patch they are."""
    folder = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
    code = (
        "import importlib, sys, types, torch\n"
        "from mft_megatron.mcore.platform import jit_fuser\n"
        "torch.compile = lambda function: 'compiled'\n"
        "sys.modules['megatron.core'] = core = types.ModuleType('megatron.core')\n"
        f"core.__path__ = [{str(folder)!r}]\n"
        "sys.modules['megatron.core.utils'] = utils = types.ModuleType('megatron.core.utils')\n"
        "utils.is_torch_min_version = lambda version: True\n"
        "activations = importlib.import_module('megatron.core.activations')\n"
        "sys.modules['megatron.core.jit'].disable_jit_fuser()\n"
        "assert activations.squared_relu == 'compiled'\n"
        "del sys.modules['megatron.core.activations']\n"
        "jit_fuser.choose_at_each_call()\n"
        "activations = importlib.import_module('megatron.core.activations')\n"
        "assert callable(activations.squared_relu)\n"
        "sys.modules['megatron.core.jit'].disable_jit_fuser()\n"
        "assert activations.squared_relu(torch.tensor(-3.0)) == 0\n"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


class _BackendError(Exception):
    """The exception of torch around the error of its compiler."""

    inner_exception = RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


def _failing(error):
    def compiled(function):
        def call(*arguments):
            raise error

        return call

    return compiled


@pytest.mark.parametrize(
    ("compiles", "problem"),
    [
        (lambda function: function, None),
        (_failing(_BackendError("backend='inductor' raised:")), "RuntimeError: Failed to find C compiler."),
        (_failing(OSError("read-only")), "OSError: read-only"),
        (lambda function: lambda x: 3 * x, "a compiled function gave wrong numbers"),
    ],
)
def test_what_keeps_the_compiler_from_working_is_said(monkeypatch, compiles, problem):
    monkeypatch.setattr(torch, "compile", compiles)
    assert jit_fuser.problem(torch.device("cpu")) == problem


@pytest.mark.slow
def test_torch_compiles_here():
    assert jit_fuser.problem(torch.device("cpu")) is None
    double = jit_fuser.fuse(lambda x: x + x)
    quadruple = jit_fuser.fuse(lambda x: double(double(x)))
    assert quadruple(torch.arange(5.0)).tolist() == [0, 4, 8, 12, 16]


def _choice(options, problems):
    """Whether this rank compiles, what its log says, and why it has no Triton, where its compilers work or not."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.kernels import triton_support
    from mft_megatron.mcore.model import compiler
    from mft_megatron.mcore.parallel import process_groups
    from tests.command_lines import SHORT_RUN

    arguments = parse_arguments(f"{SHORT_RUN} {options}".split(), 2)
    with process_groups.process_groups(arguments.distributed, 1), pytest.MonkeyPatch.context() as patch:
        problem = problems[torch.distributed.get_rank()]
        gpu = types.SimpleNamespace(HAS_CUDA=True, device=lambda: torch.device("cuda", 0))
        patch.setattr(compiler, "devices", gpu)  # the ranks still talk with gloo
        patch.setattr(jit_fuser, "problem", lambda device: problem)
        patch.setattr(triton_support, "_trial", lambda device: problem)
        compiler.choose_compiler(arguments)
        return jit_fuser._compiles, compiler.why_not(arguments), triton_support.obstacle(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("options", "problems", "compiles", "line"),
    [
        ("", (None, None), True, None),
        (
            "",
            (None, "OSError: full"),
            False,
            "not compiled, since torch.compile does not work on every node (OSError: full)",
        ),
        ("--disable-jit-fuser", (None, None), False, "not compiled (--disable-jit-fuser)"),
    ],
)
def test_all_ranks_compile_or_none(options, problems, compiles, line):
    results = run_on_ranks(2, _choice, options, problems)
    assert [found for found, _, _ in results] == [compiles, compiles]
    for _, said, obstacle in results:
        assert said == line or said.startswith(line)
        # without it, copies of a norm's weight would drift apart on two ranks
        assert obstacle == problems[1]
