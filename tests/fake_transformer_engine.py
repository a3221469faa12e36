"""Transformer Engine's linear layers in plain PyTorch, so that Megatron-Core's wrappers of them run on the CPU.

Call :func:`install` before Megatron-Core is imported. The classes have the constructors, parameter names, marks and
states of Transformer Engine 2.11 that Megatron-Core uses; the rest counts as not installed.
"""

import contextlib
import sys
import types

import torch
import torch.nn.functional as F


def _mark(tensor, axis):
    assert not hasattr(tensor, "tensor_model_parallel")
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = True, axis, 1


class _Linear(torch.nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        **others,
    ):
        super().__init__()
        assert not fuse_wgrad_accumulation
        self.in_features, self.out_features, self.parallel_mode = in_features, out_features, parallel_mode
        self.tp_size, self.tp_group = tp_size, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=params_dtype, device=device))
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            else:
                _mark(self.bias, 0)

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0

    def forward(self, hidden, is_first_microbatch=None):
        from megatron.core.tensor_parallel import mappings

        bias = self.bias if self.use_bias and not self.return_bias else None
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                hidden = mappings.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            elif self.tp_size > 1:
                hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
            output = F.linear(hidden, self.weight, bias)
        else:
            output = F.linear(hidden, self.weight)
            if self.sequence_parallel:
                output = mappings.reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
            elif self.tp_size > 1:
                output = mappings.reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
            output = output if bias is None else output + bias
        return (output, self.bias) if self.return_bias else output


class Linear(_Linear):
    """Replacement of ``transformer_engine.pytorch.Linear``."""


class LayerNormLinear(_Linear):
    """Replacement of ``transformer_engine.pytorch.LayerNormLinear``."""

    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", **others):
        assert not others.pop("zero_centered_gamma")
        assert not others.pop("return_layernorm_output")
        super().__init__(in_features, out_features, **others)
        self.eps, self.normalization = eps, normalization
        options = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, **options))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **options))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, hidden, is_first_microbatch=None):
        shape = hidden.shape[-1:]
        if self.normalization == "LayerNorm":
            normed = F.layer_norm(hidden, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            normed = F.rms_norm(hidden.float(), shape, None, self.eps).to(hidden.dtype) * self.layer_norm_weight
        return super().forward(normed)


class _Unused:
    """A class that Megatron-Core derives from or names, and that no test uses."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError


def install():
    """Register the package, as version 2.11.0."""

    def module(name, **content):
        package = types.ModuleType(f"transformer_engine{name}")
        package.__path__ = []  # lets Megatron-Core's imports of missing modules fail
        package.__dict__.update(content)
        sys.modules[package.__name__] = package
        if name:
            parent, _, last = package.__name__.rpartition(".")
            setattr(sys.modules[parent], last, package)

    unused = {name: _Unused for name in ("DotProductAttention", "LayerNorm", "RMSNorm", "GroupedLinear")}
    module("", __version__="2.11.0")
    module(".common")
    recipes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    formats = types.SimpleNamespace(E4M3="e4m3", HYBRID="hybrid")
    module(".common.recipe", Format=formats, **{name: type(name, (dict,), {}) for name in recipes})
    module(".pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, **unused)
    module(".pytorch.ops", Sequential=_Unused, FusibleOperation=_Unused)
    contexts = dict.fromkeys(("fp8_autocast", "fp8_model_init"), contextlib.nullcontext)
    module(".pytorch.fp8", FP8GlobalStateManager=_Unused, **contexts)
    module(".pytorch.distributed", CudaRNGStatesTracker=_Unused, activation_recompute_forward=None)
    module(".pytorch.tensor", QuantizedTensor=_Unused)
    module(".pytorch.tensor.utils", replace_raw_data=None, cast_master_weights_to_fp8=None)
    module(".pytorch.float8_tensor", Float8Tensor=_Unused)
    router_functions = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    module(".pytorch.router", **dict.fromkeys(router_functions))
