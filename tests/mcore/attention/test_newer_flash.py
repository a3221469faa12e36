"""FlashAttention 3 and 4 are taken by auto where they compute what plain PyTorch does, and else FlashAttention 2."""

import sys
import types

import pytest
import torch

from mft_megatron.arguments.values.attention import AttentionShape
from mft_megatron.mcore.platform import devices
from tests import fake_kernels
from tests.ranks import run_on_ranks

SHAPE = AttentionShape("bf16", 16, window=20, grouped_queries=True, context_parallel=True)
ABSENT = {"FA3": "is not installed (no flash_attn_interface)", "FA4": "is not installed (no flash_attn.cute.interface)"}


class _Registry:
    """torch.nn.attention's functions for generations of FlashAttention, as in torch 2.13 and 2.14.

    A generation is a function in place of ``varlen_attn``, or the error with which its package is imported.
    """

    def __init__(self, monkeypatch, installed, capability):
        self.installed, self.monkeypatch = installed, monkeypatch
        self.active, self.activated = None, []
        fake_kernels.install(monkeypatch)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in ("activate", "restore", "current"):
            function = getattr(self, name)
            monkeypatch.setattr(torch.nn.attention, f"{name}_flash_attention_impl", function, raising=False)
        # the kernels of this test run on the CPU
        monkeypatch.setattr(torch.Tensor, "to", _on_the_cpu(torch.Tensor.to))

    def activate(self, impl):
        self.activated.append(impl)
        found = self.installed.get(impl, ModuleNotFoundError(impl))
        if isinstance(found, Exception):
            raise found
        self._put(impl, found)

    def restore(self):
        self._put(None, fake_kernels.varlen_attn)

    def _put(self, impl, function):
        self.active = impl
        self.monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", function)

    def current(self):
        return self.active


def _on_the_cpu(to):
    def moved(tensor, target, *arguments, **options):
        if isinstance(target, torch.device) and target.type == "cuda":
            return tensor
        return to(tensor, target, *arguments, **options)

    return moved


@pytest.fixture
def choice(monkeypatch):
    """Choose for auto on a GPU with these generations; returns the choice and torch's functions."""
    from mft_megatron.mcore.attention import backends, newer_flash

    def choose(installed, capability=(9, 0), shape=SHAPE):
        registry = _Registry(monkeypatch, installed, capability)
        newer_flash.activate.cache_clear()
        return backends.choose("auto", shape), registry

    yield choose
    newer_flash.activate.cache_clear()


def _fp32(function):
    """The attention of a stand-in in fp32, rounded to the inputs' format as the kernels' is."""
    return lambda query, key, value, *arguments, **options: function(
        query.float(), key.float(), value.float(), *arguments, **options
    ).to(query.dtype)


RIGHT = _fp32(fake_kernels.varlen_attn)


def _without_windows(*arguments, window_size, **options):
    if window_size[0] >= 0:
        raise NotImplementedError("local attention is not supported\nin backward")
    return RIGHT(*arguments, window_size=window_size, **options)


def _not_causal(*arguments, window_size, **options):
    return RIGHT(*arguments, window_size=(window_size[0], -1), **options)


def _aligned_at_the_start(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    return _fp32(fake_kernels.dense)(query, key, value, cu_q, cu_k, scale, window_size, aligned_at_end=False)


def _half_the_gradient(query, *arguments, **options):
    return RIGHT(query / 2 + query.detach() / 2, *arguments, **options)


def _nan(query, *arguments, **options):
    return RIGHT(query * float("nan"), *arguments, **options)


@pytest.mark.parametrize(
    ("installed", "capability", "generation", "reasons"),
    [
        ({"FA3": RIGHT, "FA4": RIGHT}, (9, 0), "FA3", {}),
        ({"FA4": RIGHT}, (9, 0), "FA4", {"FA3": ABSENT["FA3"]}),
        ({"FA3": RIGHT, "FA4": RIGHT}, (10, 0), "FA4", {}),
        ({}, (9, 0), None, ABSENT),
        ({"FA3": RIGHT, "FA4": RIGHT}, (8, 0), None, {}),
        ({"FA3": RIGHT, "FA4": RIGHT}, (12, 0), None, {}),
        ({"FA3": OSError("undefined symbol"), "FA4": RIGHT}, (9, 0), "FA4", {"FA3": "(OSError: undefined symbol)"}),
        (
            {"FA4": _without_windows},
            (10, 0),
            None,
            {"FA4": "(NotImplementedError: local attention"},
        ),
        ({"FA4": _not_causal}, (10, 0), None, {"FA4": "gave wrong numbers"}),
        ({"FA4": _aligned_at_the_start}, (10, 0), None, {"FA4": "gave wrong numbers"}),
        ({"FA4": _half_the_gradient}, (10, 0), None, {"FA4": "gave wrong numbers"}),
        ({"FA4": _nan}, (10, 0), None, {"FA4": "gave wrong numbers"}),
    ],
)
def test_the_first_generation_that_is_right_is_taken(choice, installed, capability, generation, reasons):
    chosen, torch_functions = choice(installed, capability)
    assert chosen.generation == torch_functions.current() == generation
    assert chosen.name == ("flash" if generation is None else "varlen")
    assert chosen.why_not.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in chosen.why_not[name]
    assert chosen.describe().startswith(f"attention: varlen with {generation}" if generation else "attention: flash")


def test_what_varlen_cannot_compute_is_not_tried(choice):
    chosen, torch_functions = choice({"FA3": RIGHT}, shape=AttentionShape("bf16", 16, dropout=0.1))
    assert (chosen.name, chosen.generation, torch_functions.activated) == ("flash", None, [])


def test_a_torch_without_the_functions_is_named(choice, monkeypatch):
    from mft_megatron.mcore.attention import backends, newer_flash

    choice({})
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    newer_flash.activate.cache_clear()
    assert "cannot be activated in this torch" in backends.choose("auto", SHAPE).why_not["FA3"]


def test_a_kernel_that_is_named_is_taken_as_it_is(choice):
    from mft_megatron.mcore.attention import backends

    _, torch_functions = choice({})
    torch_functions.activated.clear()
    for name in ("varlen", "flash", "local"):
        assert backends.choose(name, SHAPE).generation is None
    assert torch_functions.activated == []


def test_nothing_is_tried_on_a_simulated_gpu(choice, monkeypatch):
    monkeypatch.setattr(devices, "device", lambda: torch.device("meta"))
    assert choice({"FA3": RIGHT})[1].activated == []


def test_random_numbers_of_the_run_stay(choice):
    before = torch.get_rng_state()
    choice({"FA3": RIGHT})
    assert torch.get_rng_state().equal(before)


def _agreed(works, installed):
    """The kernel that this rank takes after all have agreed, where some of them lack generations and packages."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.attention import agreement, backends, newer_flash
    from mft_megatron.mcore.parallel import process_groups
    from tests.command_lines import SHORT_RUN

    layout = parse_arguments(SHORT_RUN.split(), 2).distributed
    with process_groups.process_groups(layout, 1), pytest.MonkeyPatch.context() as patch:
        rank = torch.distributed.get_rank()
        gpu = types.SimpleNamespace(
            HAS_CUDA=True, device=lambda: torch.device("cuda", 0), capability=lambda: (9, 0)
        )  # the ranks still talk with gloo
        for module in (agreement, backends, newer_flash):
            patch.setattr(module, "devices", gpu)
        patch.setattr(
            newer_flash, "_try", lambda generation, *_: None if generation.name in works[rank] else "gave wrong numbers"
        )
        patch.setattr(
            backends,
            "unavailable",
            lambda name, shape: None if name in ("varlen", *installed[rank]) else "is not installed",
        )
        patch.setattr(backends, "_left_out", {})
        newer_flash.activate.cache_clear()
        agreement.agree("auto", SHAPE)
        choice = backends.choose("auto", SHAPE)
        agreement.agree("auto", SHAPE)
        newer_flash.activate.cache_clear()
        return choice.preferred_as, choice.describe()


@pytest.mark.parametrize(
    ("works", "installed", "taken", "said"),
    [
        (({"FA3"}, {"FA3"}), ((), ()), "FA3", "attention: varlen with FA3"),
        (({"FA3"}, ()), ((), ()), "varlen", "FA3 is not taken, since on rank 1 it gave wrong numbers"),
        (({"FA3", "FA4"}, {"FA4"}), ((), ()), "FA4", "FA3 is not taken"),
        (({"FA3"}, {"FA4"}), (("flash",), ()), "varlen", "flash is not taken, since on rank 1 it is not installed"),
    ],
)
def test_all_ranks_take_the_same(works, installed, taken, said):
    for name, words in run_on_ranks(2, _agreed, works, installed):
        assert name == taken
        assert said in words


def test_a_generation_that_is_left_out_is_active_no_longer(choice):
    from mft_megatron.mcore.attention import newer_flash

    _, torch_functions = choice({"FA3": RIGHT})
    assert torch_functions.current() == "FA3"
    assert newer_flash.activate(SHAPE, frozenset({"FA3"}))[0] is None
    assert torch_functions.current() is None
