"""Transformer Engine's ``FusedAdam`` in plain PyTorch: Megatron-Core's precision-aware optimizer runs on the CPU.

Call :func:`install` in a process that has imported Megatron-Core without Transformer Engine. Signatures, states, dtypes
and errors are those of ``optimizers/fused_adam.py`` and ``multi_tensor/adam.cu`` of Transformer Engine 2.11; of its
options, those that Megatron-Core gives.
"""

import sys
import types

import torch

STATES = ("exp_avg", "exp_avg_sq", "master_param")
LARGEST = {torch.float16: torch.finfo(torch.float16).max / 2, torch.uint8: 448.0}


class Float8Tensor(torch.Tensor):
    """An fp8 tensor with one scale; holds the values that the 8 bits stand for."""

    @staticmethod
    def of(shape):
        return torch.zeros(shape).as_subclass(Float8Tensor)

    def set(self, values, scale):
        held = (values / scale).to(torch.float8_e4m3fn).float() * scale
        self.as_subclass(torch.Tensor).copy_(held)

    def float(self):
        return self.as_subclass(torch.Tensor).clone()


class FusedAdam(torch.optim.Optimizer):
    """Adam with states in chosen dtypes; those in fp16 and fp8 have a scale each."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        assert adam_w_mode
        assert not any((amsgrad, capturable, set_grad_none))
        if master_weights and master_weight_dtype not in (torch.float32, torch.float16):
            raise RuntimeError("FusedAdam only supports fp32/fp16 master weights.")
        settings = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**settings, "weight_decay": weight_decay})
        self.master_weights, self.master_weight_dtype = master_weights, master_weight_dtype
        self.name_to_dtype_map = dict(zip(STATES, (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype), strict=True))
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights and master_weight_dtype == torch.float32
        self._scales = {}

    def zero_grad(self, set_to_none=None):
        assert set_to_none is not False
        for group in self.param_groups:
            for parameter in group["params"]:
                setattr(parameter, "decoupled_grad" if self.use_decoupled_grad else "grad", None)

    def _as_remainders(self, parameter, name):
        return self.store_param_remainders and name == "master_param" and parameter.dtype == torch.bfloat16

    def get_unscaled_state(self, param, state_name):
        state = self.state[param][state_name]
        dtype = self.name_to_dtype_map[state_name]
        if dtype == torch.float32:
            assert state.dtype == (torch.int16 if self._as_remainders(param, state_name) else torch.float32)
            return state
        unscaled = state.float()
        return unscaled.mul_(self._scales[param][state_name]) if dtype == torch.float16 else unscaled

    def set_scaled_state(self, param, state_name, unscaled_state):
        remainders = self._as_remainders(param, state_name)
        assert unscaled_state.dtype == (torch.int16 if remainders else torch.float32)
        if state_name not in self.state[param]:
            self._initialize_state(param, state_name, False, remainders)
        state, dtype = self.state[param][state_name], self.name_to_dtype_map[state_name]
        if dtype in LARGEST:
            scale = self._scales[param][state_name]
            scale.copy_(unscaled_state.abs().max() / LARGEST[dtype])
            if dtype == torch.uint8:
                state.set(unscaled_state, scale.clamp(min=1e-45))
            else:
                state.copy_(unscaled_state.mul_(torch.where(scale > 0, scale.reciprocal(), 0.0)))
        else:
            state.copy_(unscaled_state)

    def _initialize_state(self, param, state_name, zero_buffer, store_param_remainders=False):
        dtype = torch.int16 if store_param_remainders else self.name_to_dtype_map[state_name]
        if dtype == torch.uint8:
            self.state[param][state_name] = Float8Tensor.of(param.shape)
        else:
            # the real ones are undefined where they are not zero
            fill = 0 if zero_buffer or store_param_remainders else 77
            self.state[param][state_name] = torch.full(param.shape, fill, dtype=dtype)
        if self.name_to_dtype_map[state_name] != torch.float32:
            self._scales.setdefault(param, {})[state_name] = torch.ones(1)

    def initialize_state(self, param, store_param_remainders):
        self._initialize_state(param, "exp_avg", True)
        self._initialize_state(param, "exp_avg_sq", True)
        if self.master_weights:
            self._initialize_state(param, "master_param", False, store_param_remainders)
            if not store_param_remainders:
                self.set_scaled_state(param, "master_param", param.clone().detach().float())

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.initialize_state(parameter, self._as_remainders(parameter, "master_param"))
                gradient = parameter.decoupled_grad if self.use_decoupled_grad else parameter.grad
                if gradient is not None:
                    self._update(group, parameter, gradient.float())

    def _update(self, group, parameter, gradient):
        beta1, beta2 = group["betas"]
        first, second = (self.get_unscaled_state(parameter, name) for name in STATES[:2])
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        corrections = [1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in (beta1, beta2)]
        direction = first / corrections[0] / ((second / corrections[1]).sqrt() + group["eps"])
        remainders = self._as_remainders(parameter, "master_param")
        if remainders:
            main = _joined(parameter, self.state[parameter]["master_param"])
        elif self.master_weights and parameter.dtype != torch.float32:
            main = self.get_unscaled_state(parameter, "master_param")
        else:
            main = parameter.data
        main -= group["lr"] * (direction + group["weight_decay"] * main)
        if remainders:
            _split_into(main, parameter, self.state[parameter]["master_param"])
        else:
            parameter.copy_(main)
        for name, value in zip(STATES, (first, second, main), strict=True):
            if self.name_to_dtype_map[name] != torch.float32 and name in self.state[parameter]:
                self.set_scaled_state(parameter, name, value.clone())


def _joined(weight, remainder):
    """Main weights from halves, with numpy's integers."""
    import numpy as np

    halves = np.stack([remainder.numpy(), weight.detach().view(torch.int16).numpy()], -1)  # little-endian
    halves[..., 1] -= halves[..., 0] < 0  # undo rounding
    return torch.from_numpy(halves.view(np.float32)[..., 0].copy())


def _split_into(main, weight, remainder):
    """Set weights and remainders from main weights, with numpy's integers."""
    import numpy as np

    halves = main.contiguous().numpy().view(np.int16).reshape(*main.shape, 2).copy()
    halves[..., 1] += halves[..., 0] < 0  # round up
    remainder.copy_(torch.from_numpy(halves[..., 0].copy()))
    weight.data.copy_(torch.from_numpy(halves[..., 1].copy()).view(torch.bfloat16))


def install():
    """Let Megatron-Core and this package find the optimizer, as of Transformer Engine 2.11; for the whole process."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    from mft_megatron.mcore.optim import optimizer as ours

    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.setdefault(name, types.ModuleType(name))
    module = types.ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = FusedAdam
    sys.modules[module.__name__] = module
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = ours.USING_TE_OPTIMIZER = True
    optimizer.is_te_min_version = optimizer_config.is_te_min_version = lambda version: True
