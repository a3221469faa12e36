"""Replacements of torch's questions to CUDA in a process that simulates a GPU, in the order in which they are applied.

A dry run is a process of its own, so what is replaced here is torch's, too, not only what Megatron-Core sees.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mft_megatron.mcore.platform.simulated_gpu import SimulatedGPU

from .listener import listener

META = torch.device("meta")
# storages on the host that a process with a GPU would have pinned
_pinned = torch.utils.weak.WeakIdKeyDictionary()


class _Stream:
    """A stream or an event of the simulated GPU, whose work is always done."""

    def __init__(self, *arguments: object, **options: object):
        self.cuda_stream, self.device = 0, META

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or _Stream()

    def synchronize(self) -> None:
        listener().waited("event")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def elapsed_time(self, end: "_Stream") -> float:
        return 0.0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _nothing(self, *arguments: object, **options: object) -> None:
        pass

    wait = wait_event = wait_stream = record = _nothing


class _Generator:
    """The generator of random numbers of the simulated GPU: a state that is only handed from one place to another."""

    def __init__(self) -> None:
        self._state = torch.get_rng_state()

    def __getitem__(self, device: object) -> "_Generator":
        return self

    def get_state(self) -> Tensor:
        return self._state

    def set_state(self, state: Tensor) -> None:
        pass


def _replace(owner: object, **values: object) -> None:
    """Set attributes of a module or class whatever their types: that of torch's function is another one."""
    for name, value in values.items():
        setattr(owner, name, value)


def _nothing() -> Callable[..., None]:
    """A new function that does nothing: torch's compiler refuses one function under two names."""
    return lambda *arguments, **options: None


def replace_cuda_functions(gpu: SimulatedGPU) -> None:
    """Answer the questions of torch.cuda for a GPU that is not there."""
    generator = _Generator()
    random = {
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": _nothing(),
        "manual_seed": _nothing(),
        "manual_seed_all": _nothing(),
    }
    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=1,
        warp_size=32,
    )
    _replace(
        torch.cuda,
        _lazy_init=_nothing(),
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 8,
        current_device=lambda: META,
        set_device=_nothing(),
        device=lambda device: contextlib.nullcontext(),
        get_device_capability=lambda device=None: gpu.capability,
        get_device_name=lambda device=None: gpu.name,
        get_device_properties=lambda device=None: properties,
        synchronize=lambda device=None: listener().waited("device"),
        current_stream=lambda device=None: _Stream(),
        default_stream=lambda device=None: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        Stream=_Stream,
        Event=_Stream,
        empty_cache=_nothing(),
        is_current_stream_capturing=lambda: False,
        is_bf16_supported=lambda *arguments, **options: gpu.capability >= (8, 0),
        memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        memory_reserved=lambda device=None: 0,
        default_generators=generator,
        **random,
    )
    _replace(torch.cuda.random, **random)
    _replace(
        torch.accelerator,
        current_stream=lambda device=None: _Stream(),
        current_device_index=lambda: 0,
        synchronize=lambda device=None: listener().waited("device"),
    )
    _replace(torch.cuda.nvtx, range_push=_nothing(), range_pop=_nothing())


def as_pinned(tensor: Tensor) -> Tensor:
    """Let a tensor on the host count as pinned; returns it."""
    _pinned[tensor.untyped_storage()] = True
    return tensor


def replace_tensor_methods() -> None:
    """Let tensors without content name themselves CUDA's, by which Megatron-Core's optimizer sorts, and be pinned."""
    original_type: Callable[..., Any] = torch.Tensor.type
    original_to: Callable[..., Any] = torch.Tensor.to

    def cuda_type(tensor: Tensor, dtype: Any = None, *arguments: Any, **options: Any) -> Any:
        name = original_type(tensor, *(() if dtype is None else (dtype,)), *arguments, **options)
        return name.replace("torch.meta.", "torch.cuda.", 1) if isinstance(name, str) else name

    def cuda(tensor: Tensor, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
        return original_to(tensor, META, non_blocking=non_blocking)

    def pin(tensor: Tensor, device: Any = None) -> Tensor:
        return as_pinned(tensor.clone())

    def is_pinned(tensor: Tensor, device: Any = None) -> bool:
        return tensor.untyped_storage() in _pinned

    _replace(
        torch.Tensor,
        type=cuda_type,
        cuda=cuda,
        is_cuda=property(lambda tensor: tensor.is_meta),
        pin_memory=pin,
        is_pinned=is_pinned,
        record_stream=_nothing(),
    )


def replace_tensors_from_values() -> None:
    """Let tensors of Python's values be made on the host and copied, as torch does on CUDA."""

    def on_gpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(data: Any, *arguments: Any, device: Any = None, **options: Any) -> Tensor:
            if device is None or torch.device(device).type == "cpu":
                return make(data, *arguments, device=device, **options)
            requires_grad = options.pop("requires_grad", False)
            return make(data, *arguments, **options).to(META).requires_grad_(requires_grad)

        return made

    _replace(torch, tensor=on_gpu(torch.tensor), as_tensor=on_gpu(torch.as_tensor))


def replace_storage_resizing() -> None:
    """Tell the listener of storages whose memory is freed or allocated again while tensors stay."""
    original: Callable[..., Any] = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        listener().resized(storage)
        return result

    _replace(torch.UntypedStorage, resize_=resize)


def replace_kernel_choices() -> None:
    """Let torch's optimizers and dropout take the kernels that they take on CUDA."""
    from torch.optim import _functional, adam, adamw, optimizer  # noqa: F401
    from torch.utils import _foreach_utils

    for name in ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"):
        devices = getattr(_foreach_utils, name)()
        for module in (_foreach_utils, optimizer):
            if hasattr(module, name):
                _replace(module, **{name: lambda devices=devices: [*devices, "meta"]})

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and 0 < p < 1 else input

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.dtype in (torch.bfloat16, torch.float16) and attn_mask is None and query.shape[-1] <= 256:
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if not enable_gqa:
            return _memory_efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": True}
        return plain(query, key, value, attn_mask, **options)

    functional = torch.nn.functional
    plain: Callable[..., Tensor] = functional.scaled_dot_product_attention
    _replace(functional, dropout=dropout, scaled_dot_product_attention=attention)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    """FlashAttention as torch calls it: heads are padded to a multiple of 8."""
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if size % 8:
        query, key, value = (torch.nn.functional.pad(tensor, (0, 8 - size % 8)) for tensor in (query, key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, False, scale=scale)
    return output[0][..., :size]


def _memory_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Memory-efficient attention as torch calls it: a mask becomes a bias whose rows are aligned."""
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
        mask = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
        mask = mask.expand(query.shape[0], query.shape[1], -1, -1)
    output = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, dropout, causal, scale=scale
    )
    return output[0]


def replace_jit() -> None:
    """Let functions that Megatron-Core would compile for a GPU run as one kernel each: without what lives within."""

    def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def fused(*arguments: Any, **options: Any) -> Any:
            with region():
                return function(*arguments, **options)

        return fused

    jit = types.ModuleType("megatron.core.jit")
    _replace(jit, jit_fuser=fuse, noop_decorator=lambda f: f, enable_jit_fuser=_nothing(), disable_jit_fuser=_nothing())
    sys.modules["megatron.core.jit"] = jit


@contextlib.contextmanager
def region() -> Iterator[None]:
    """A region that is one kernel on a GPU."""
    listener().fused(True)
    try:
        yield
    finally:
        listener().fused(False)
