"""Transformer Engine's linear layers in plain PyTorch, so that Megatron-Core's wrappers of them run on the CPU.

Call :func:`install` before Megatron-Core is imported. Constructors, ``forward``, parameters and their order, marks and
states are those of ``transformer_engine/pytorch/module/linear.py`` and ``layernorm_linear.py`` of releases 2.9 to 2.11,
which agree in them, as are sums of gradients (``fuse_wgrad_accumulation``). What Megatron-Core uses no value of here,
such as overlap of communication, is refused; the rest of the package counts as not installed.
"""

import contextlib
import sys
import types

import torch
import torch.nn.functional as F

_dummies = {}


def get_dummy_wgrad(shape, dtype, zero=False):
    """Replacement of ``transformer_engine.pytorch.module.base.get_dummy_wgrad``: one tensor for each shape.

    Whoever adds its content, which is unspecified there, gets NaN here.
    """
    assert len(shape) == 2
    dummy = _dummies.setdefault((shape[0], shape[1], dtype), torch.full(shape, torch.nan, dtype=dtype))
    dummy.fill_(0 if zero else torch.nan)
    return dummy.detach()


class _Product(torch.autograd.Function):
    """The products of a layer; its weight's gradient is returned, or added to ``main_grad`` in the latter's dtype.

    The first micro-batch overwrites ``main_grad`` where the caller says which that is.
    """

    @staticmethod
    def forward(ctx, hidden, weight, is_first_microbatch, fuse):
        ctx.save_for_backward(hidden, weight)
        ctx.first, ctx.fuse = is_first_microbatch, fuse
        if fuse and weight.requires_grad:
            ctx.main_grad = lambda: weight.main_grad
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        hidden_gradient = gradient @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None, None
        flat, of = gradient.flatten(0, -2), hidden.flatten(0, -2)
        if not ctx.fuse:
            return hidden_gradient, flat.t() @ of, None, None
        main_grad = weight.main_grad = ctx.main_grad()
        overwrite = bool(ctx.first) or getattr(weight, "overwrite_main_grad", False)
        product = (flat.double().t() @ of.double()).to(main_grad.dtype)
        main_grad.copy_(product) if overwrite else main_grad.add_(product)
        dummy = None
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            dummy = get_dummy_wgrad(list(main_grad.shape), weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))
        return hidden_gradient, dummy, None, None


def _mark(tensor, axis):
    assert not hasattr(tensor, "tensor_model_parallel")
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = True, axis, 1


class Linear(torch.nn.Module):
    """Replacement of ``transformer_engine.pytorch.Linear``."""

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
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        overlapped = ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad
        assert not any((*overlapped, delay_wgrad_compute, symmetric_ar_type, parameters_split))
        if parallel_mode not in ("row", "column", None):
            raise AssertionError(f"parallel_mode {parallel_mode} not supported")
        self.in_features, self.out_features, self.parallel_mode = in_features, out_features, parallel_mode
        self.tp_size, self.tp_group, self.fuse_wgrad_accumulation = tp_size, tp_group, fuse_wgrad_accumulation
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.make_norm(in_features, params_dtype, device)
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=params_dtype, device=device))
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            else:
                _mark(self.bias, 0)

    def make_norm(self, features, dtype, device):
        """Make the parameters that come before the weight."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0

    def product(self, hidden, is_first_microbatch):
        assert hidden.shape[-1] == self.weight.shape[-1], "GEMM not possible"
        if not torch.is_grad_enabled():
            return hidden @ self.weight.t()
        return _Product.apply(hidden, self.weight, is_first_microbatch, self.fuse_wgrad_accumulation)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        from megatron.core.tensor_parallel import mappings

        bias = self.bias if self.use_bias and not self.return_bias else None
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
            elif self.tp_size > 1:
                inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
            output = self.product(inp, is_first_microbatch)
        else:
            output = self.product(inp, is_first_microbatch)
            if self.sequence_parallel:
                output = mappings.reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
            elif self.tp_size > 1:
                output = mappings.reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        output = output if bias is None else output + bias
        return (output, self.bias) if self.return_bias else output


class LayerNormLinear(Linear):
    """Replacement of ``transformer_engine.pytorch.LayerNormLinear``, whose arguments differ from the linear layer's."""

    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        assert not any((zero_centered_gamma, return_layernorm_output, return_layernorm_output_gathered))
        self.normalization = normalization
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            get_rng_state_tracker=get_rng_state_tracker,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            parameters_split=parameters_split,
            device=device,
            ub_overlap_ag=ub_overlap_ag,
            ub_overlap_rs=ub_overlap_rs,
            ub_overlap_rs_dgrad=ub_overlap_rs_dgrad,
            ub_bulk_dgrad=ub_bulk_dgrad,
            ub_bulk_wgrad=ub_bulk_wgrad,
            ub_name=ub_name,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
            name=name,
        )
        self.eps = eps

    def make_norm(self, features, dtype, device):
        options = {"dtype": dtype, "device": device}
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(features, **options))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(features, **options))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        shape = inp.shape[-1:]
        if self.normalization == "LayerNorm":
            normed = F.layer_norm(inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            normed = F.rms_norm(inp.float(), shape, None, self.eps).to(inp.dtype) * self.layer_norm_weight
        return super().forward(normed, is_first_microbatch, fp8_output, fp8_grad)


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
    module(".pytorch.module")
    module(".pytorch.module.base", get_dummy_wgrad=get_dummy_wgrad)
    module(".pytorch.ops", Sequential=_Unused, FusibleOperation=_Unused)
    contexts = dict.fromkeys(("fp8_autocast", "fp8_model_init"), contextlib.nullcontext)
    module(".pytorch.fp8", FP8GlobalStateManager=_Unused, **contexts)
    module(".pytorch.distributed", CudaRNGStatesTracker=_Unused, activation_recompute_forward=None)
    module(".pytorch.tensor", QuantizedTensor=_Unused)
    module(".pytorch.tensor.utils", replace_raw_data=None, cast_master_weights_to_fp8=None)
    module(".pytorch.float8_tensor", Float8Tensor=_Unused)
    router_functions = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    module(".pytorch.router", **dict.fromkeys(router_functions))
