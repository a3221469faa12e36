"""The kernels of --attention-backend: their arguments, refusals, and the choice of auto.

The packages are replaced by plain PyTorch with their signatures and meanings (``fake_kernels``); ``tests/gpu`` compares
the real ones.
"""

import dataclasses
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

from mft_megatron.arguments.values.attention import BACKENDS, AttentionShape
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel.attention_spans import Spans
from tests import fake_kernels
from tests.ranks import run_on_ranks
from tests.refusals import refused_call

# queries and keys of each segment slice
SLICES = {
    "segments": ((7, 1, 16, 8), (7, 1, 16, 8)),
    "fewer queries than keys": ((7, 1, 5, 8), (7, 9, 16, 30)),
    "one long": ((64,), (64,)),
    "many of one token": ((1,) * 20, (1,) * 20),
    "one query": ((1, 1), (40, 3)),
}
FAST = ("varlen", "flash", "fused")
BF16 = AttentionShape("bf16", 8)


def tensors(lengths, heads, groups, size=8, seed=0):
    """Query [queries, heads, size], key and value [keys, groups, size], and a gradient of the output, all fp64."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = map(sum, lengths)
    shapes = [(queries, heads, size), (keys, groups, size), (keys, groups, size), (queries, heads, size)]
    *inputs, upstream = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return [tensor.requires_grad_() for tensor in inputs], upstream


def forward_and_backward(kernel, lengths, heads, groups, scale, window):
    """Output of a kernel, and gradients of query, key and value."""
    inputs, upstream = tensors(lengths, heads, groups)
    output = kernel(*inputs, Spans.of(*map(np.array, lengths)), scale, window, 0.0)
    output.backward(upstream)
    return [output, *(tensor.grad for tensor in inputs)]


def kernel_of(name):
    """The kernel of a backend for bf16 and heads of 8."""
    from mft_megatron.mcore.attention.backends import choose

    return choose(name, BF16).kernel


@pytest.fixture
def packages(monkeypatch):
    """Replace the packages of kernels by plain PyTorch."""
    fake_kernels.install(monkeypatch)


@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("case", SLICES)
@pytest.mark.parametrize("name", FAST)
def test_each_computes_what_local_does(packages, name, case, heads, groups, window):
    from mft_megatron.mcore.attention.sdpa import local

    arguments = (SLICES[case], heads, groups, 0.3 if window == 3 else None, window)
    ours, theirs = (forward_and_backward(kernel, *arguments) for kernel in (kernel_of(name), local))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [False, True])
def test_flash_follows_the_switch_of_deterministic_algorithms(monkeypatch, wanted):
    """Its gradient of the queries is a sum in the order in which blocks are done, unless it is told otherwise."""
    told = []

    def flash_attn_varlen_func(*arguments, deterministic=False, **options):
        told.append(deterministic)
        return fake_kernels.flash_attn_varlen_func(*arguments, **options)

    fake_kernels.install(monkeypatch, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)
    lengths = np.array([5, 9])
    kernel_of("flash")(*torch.randn(3, 14, 2, 8), Spans.of(lengths, lengths))
    assert told == [wanted]


def test_a_view_with_scattered_heads_is_made_dense(packages):
    lengths = np.array([5, 9])
    scattered = [torch.randn(8, 14, 4).permute(1, 2, 0) for _ in range(3)]
    dense = [tensor.contiguous() for tensor in scattered]
    spans = Spans.of(lengths, lengths)
    for name in ("varlen", "fused"):
        assert kernel_of(name)(*scattered, spans).equal(kernel_of(name)(*dense, spans))


def test_every_choice_has_a_kernel():
    from mft_megatron.mcore.attention.backends import KERNELS

    assert {"auto", *KERNELS} == set(BACKENDS)


def test_the_replacement_of_varlen_has_its_signature():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen attention")
    of_each_torch = (fake_kernels.varlen_attn, fake_kernels.varlen_attn_of_2_11, fake_kernels.varlen_attn_of_2_10)

    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(varlen.varlen_attn) in list(map(parameters, of_each_torch))


GROUPED, WINDOWED = (dataclasses.replace(BF16, **needs) for needs in ({"grouped_queries": True}, {"window": 3}))


@pytest.mark.parametrize(
    ("varlen_attn", "shape", "lacking"),
    [
        (fake_kernels.varlen_attn, dataclasses.replace(GROUPED, window=3), None),
        (fake_kernels.varlen_attn_of_2_11, BF16, None),
        (fake_kernels.varlen_attn_of_2_11, WINDOWED, None),
        (fake_kernels.varlen_attn_of_2_11, GROUPED, "has no enable_gqa in this torch "),
        (fake_kernels.varlen_attn_of_2_10, BF16, "has no scale, window_size in this torch "),
        (fake_kernels.varlen_attn_of_2_10, GROUPED, "has no enable_gqa, scale, window_size in this torch "),
        (None, BF16, "is not in this torch "),
    ],
)
def test_varlen_is_taken_only_where_torch_has_what_the_run_needs(monkeypatch, varlen_attn, shape, lacking):
    """Otherwise the first step would fail, also with ``auto``."""
    from mft_megatron.mcore.attention.backends import choose
    from mft_megatron.mcore.attention.sdpa import local

    fake_kernels.install(monkeypatch, {"flash_attn": None}, varlen_attn=varlen_attn)
    automatic = choose("auto", shape)
    if lacking is None:
        arguments = (SLICES["segments"], 4, 2 if shape.grouped_queries else 4, 0.3, shape.window)
        for kernel in (automatic.kernel, choose("varlen", shape).kernel):
            assert kernel is not local
            for one, other in zip(*(forward_and_backward(k, *arguments) for k in (kernel, local)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    else:
        line = refused_call(choose, "varlen", shape)
        assert line.startswith(f"--attention-backend varlen {lacking}{torch.__version__}")
        assert line.endswith("; install torch 2.12 or newer, or use flash or local")
        assert automatic.kernel is local
        assert f"; varlen {lacking}" in automatic.describe()


@pytest.mark.parametrize("name", ["flash", "fused"])
def test_dropout_is_passed_on(packages, name):
    inputs, _ = tensors(SLICES["segments"], 4, 2)
    spans, kernel = Spans.of(*map(np.array, SLICES["segments"])), kernel_of(name)
    torch.manual_seed(0)
    dropped = kernel(*inputs, spans, None, None, 0.5)
    whole = kernel(*inputs, spans, None, None, 0.0)
    assert kernel(*inputs, spans, None, None, 0.0).equal(whole)
    assert not dropped.equal(whole)
    # a kept weight is scaled by 1 / (1 - p): with one key the output is 0 or twice as large
    one = whole[7], dropped[7]
    assert all(torch.allclose(b, torch.zeros_like(b)) or torch.allclose(b, 2 * a) for a, b in zip(*one, strict=True))


@pytest.mark.parametrize("name", ["flash", "fused"])
def test_a_recomputed_layer_drops_the_same_weights(packages, name):
    """The first pass of a recomputed layer has no gradients."""
    inputs, _ = tensors(SLICES["segments"], 4, 2)
    spans, kernel, outputs = Spans.of(*map(np.array, SLICES["segments"])), kernel_of(name), []
    for records in (False, True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(records):
            outputs.append(kernel(*inputs, spans, None, None, 0.5))
    assert outputs[0].equal(outputs[1])


def test_varlen_has_no_dropout(packages):
    inputs, _ = tensors(SLICES["segments"], 4, 2)
    with pytest.raises(ValueError, match="no dropout"):
        kernel_of("varlen")(*inputs, Spans.of(*map(np.array, SLICES["segments"])), None, None, 0.5)


def test_no_kernel_of_cudnn_is_an_error_of_one_line(packages):
    inputs, _ = tensors(SLICES["one query"], 4, 2)
    with pytest.raises(InputError, match="--attention-backend fused: Transformer Engine finds no kernel") as refused:
        kernel_of("fused")(*inputs, Spans.of(*map(np.array, SLICES["one query"])), None, None, 0.5)
    assert refused.value.always


def _dropout_of_the_module(name):
    """Dropout that the kernel gets while training and in evaluation, and the keys of the module's state."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.attention.packed_attention import PackedAttention, PackedStream
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard

    with pytest.MonkeyPatch.context() as monkeypatch, process_groups.process_groups(DistributedArguments(), seed=1):
        fake_kernels.install(monkeypatch)
        config = TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=4, params_dtype=torch.bfloat16, attention_dropout=0.5
        )
        attention = PackedAttention(config, 1, AttnMaskType.causal, "self", backend=name)
        kernel, dropouts = attention.kernel, []
        attention.kernel = lambda *arguments: (dropouts.append(arguments[-1]), kernel(*arguments))[1]
        lengths = np.array([5, 7])
        shard = ContextParallelShard(Spans.of(lengths, lengths), torch.arange(12))
        inputs = [torch.randn(12, 1, 4, 8) for _ in range(3)]
        for train in (True, False):
            attention.train(train)
            attention(*inputs, None, packed_seq_params=PackedStream(shard=shard))
        return dropouts, list(attention.state_dict())


@pytest.mark.parametrize("name", ["flash", "fused"])
def test_no_dropout_in_evaluation_and_nothing_in_the_checkpoint(name):
    assert run_on_ranks(1, _dropout_of_the_module, name) == [([0.5, 0.0], [])]


@pytest.mark.parametrize(
    ("missing", "shape", "chosen", "why_not"),
    [
        ((), BF16, "flash", {}),
        (("flash_attn",), BF16, "varlen", {"flash": "not installed"}),
        (("flash_attn",), AttentionShape("bf16", 8, 0.1), "local", {"flash": "not installed", "varlen": "no dropout"}),
        ((), AttentionShape("bf16", 8, 0.1), "flash", {}),
        ((), AttentionShape("fp16", 12), "flash", {}),
        ((), AttentionShape("fp32", 8), "local", {"flash": "not in fp32", "varlen": "not in fp32"}),
        ((), AttentionShape("bf16", 264), "local", {"flash": "up to 256", "varlen": "up to 256"}),
    ],
)
def test_auto_takes_the_first_that_can(monkeypatch, missing, shape, chosen, why_not):
    from mft_megatron.mcore.attention.backends import choose

    fake_kernels.install(monkeypatch, dict.fromkeys(missing))
    choice = choose("auto", shape)
    assert choice.name == chosen
    # of the others test_newer_flash
    assert set(choice.why_not) - {"FA3", "FA4"} == set(why_not)
    assert all(text in choice.why_not[name] for name, text in why_not.items())
    line = choice.describe()
    assert line.startswith(f"attention: {chosen}")
    assert all(name in line for name in why_not)
    assert "\n" not in line


def test_without_cuda_it_is_local():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    from mft_megatron.mcore.attention.backends import choose
    from mft_megatron.mcore.attention.sdpa import local

    assert choose("auto", BF16).kernel is choose("local", BF16).kernel is local
    for name in FAST:
        with pytest.raises(InputError, match=f"^--attention-backend {name} needs a CUDA device"):
            choose(name, BF16)


@pytest.mark.parametrize(
    ("name", "capability", "shape", "text"),
    [
        ("flash", (7, 5), BF16, "needs compute capability 8.0, and this GPU has 7.5"),
        ("varlen", (7, 5), BF16, "needs compute capability 8.0"),
        ("fused", (8, 0), BF16, "needs compute capability 9.0"),
        ("flash", (8, 9), AttentionShape("bf16", 256), "heads of up to 192 on compute capability 8.9, not 256"),
        ("varlen", (9, 0), AttentionShape("bf16", 12), "multiple of 8"),
        ("flash", (9, 0), AttentionShape("bf16", 257), "up to 256"),
        ("flash", (9, 0), AttentionShape("fp32", 8), "not in fp32"),
        ("unfused", (9, 0), BF16, "packs are streams"),
        ("flsh", (9, 0), BF16, "is none of auto, local"),
    ],
)
def test_refusals_name_the_reason(monkeypatch, name, capability, shape, text):
    from mft_megatron.mcore.attention.backends import choose

    fake_kernels.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(InputError) as refused:
        choose(name, shape)
    assert str(refused.value).startswith(f"--attention-backend {name} ")
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert choose("local", shape).name == "local"


@pytest.mark.parametrize(("name", "package"), [("flash", "flash-attn"), ("fused", "transformer-engine")])
def test_packages_that_are_absent_too_old_or_broken(monkeypatch, tmp_path, name, package):
    from mft_megatron.mcore.attention.backends import choose

    module = package.replace("-", "_")

    def refusal():
        line = refused_call(choose, name, BF16)
        assert "pip install --no-build-isolation" in line
        assert "or use varlen or local" in line
        return line

    with monkeypatch.context() as patch:
        fake_kernels.install(patch, {module: None})
        assert f"needs {package}, which is not installed" in refusal()
    with monkeypatch.context() as patch:
        fake_kernels.install(patch, {module: "1.0"})
        assert "or newer, and 1.0 is installed" in refusal()
    # built for another torch: the package is found, its compiled module is not
    for content, message in (
        ("raise ImportError('undefined symbol: _ZN3c104cuda\\nsecond line')", "ImportError: undefined symbol"),
        ("raise OSError('libcudnn.so.9: cannot open')", "OSError: libcudnn.so.9"),
        ("import compiled_part_that_is_not_there", "No module named 'compiled_part_that_is_not_there'"),
    ):
        folder = tmp_path / str(abs(hash(content))) / module
        (folder / "pytorch").mkdir(parents=True)
        (folder / "__init__.py").write_text(content)
        (folder / "pytorch" / "__init__.py").write_text(content)
        with monkeypatch.context() as patch:
            fake_kernels.install(patch, {module: None})
            patch.syspath_prepend(folder.parent)
            assert message in (line := refusal())
            assert "installed and cannot be imported" in line


@pytest.mark.filterwarnings("ignore:full scope is deprecated")
def test_the_shape_is_that_of_the_configuration():
    """A window that sees all tokens to the left is none."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.attention.backends import shape_of

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, kv_channels=16, params_dtype=torch.float16
    )
    assert shape_of(config, 0.2) == AttentionShape("fp16", 16, 0.2)
    windowed = dataclasses.replace(config, window_size=(5, 0), params_dtype=torch.float32)
    assert shape_of(windowed, 0.0) == AttentionShape("fp32", 16, 0.0, 5)
    assert shape_of(dataclasses.replace(config, window_size=(-1, 0)), 0.0).window is None
    assert shape_of(dataclasses.replace(config, num_query_groups=2), 0.0).grouped_queries


def test_choosing_needs_neither_package():
    """Importing the module imports neither: a broken installation must not stop a run with local."""
    code = (
        "import sys, mft_megatron.mcore.attention.backends\n"
        "assert not {'flash_attn', 'transformer_engine.pytorch'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
