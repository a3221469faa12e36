"""Environment variables that are set for CUDA, before it reads them, and those of the user that are set aside."""

import ctypes
import importlib.util
import os
import warnings

import pytest
import torch

from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices, environment


class Management:
    """NVIDIA's management library (NVML, API version 12) with GPUs of these capabilities; ``None``: not permitted."""

    def __init__(self, *capabilities, broken=False):
        self.capabilities, self.broken, self.open = capabilities, broken, 0

    def nvmlInit_v2(self):  # noqa: N802
        self.open += not self.broken
        return 9 if self.broken else 0  # driver not loaded

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.capabilities)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):  # noqa: N802
        device._obj.value = 100 + index.value
        return 4 if self.capabilities[index.value] is None else 0

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):  # noqa: N802
        major._obj.value, minor._obj.value = self.capabilities[device.value - 100]
        return 0


@pytest.mark.parametrize(
    ("library", "connections"),
    [
        (None, "1"),  # no driver
        (Management(broken=True), "1"),
        (Management(), "1"),
        (Management((9, 0), (9, 0)), "1"),
        (Management((10, 0), (8, 0)), "1"),
        (Management((10, 0), None, (10, 0)), None),
        (Management((12, 0)), None),
    ],
)
def test_connections_are_limited_up_to_hopper(monkeypatch, library, connections):
    def load(name):
        assert name == "libnvidia-ml.so.1"
        if library is None:
            raise OSError(name)
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    variables = {}
    with warnings.catch_warnings():
        environment.limit_connections(variables)
    assert variables.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections
    assert library is None or library.open == 0


def test_connections_of_the_user_stay(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", None)  # nothing is asked
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    environment.limit_connections(variables)
    assert variables == {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


def test_megatron_does_not_advise_against_the_connections_of_blackwell(monkeypatch):
    """Its linear layers recommend 1 on every GPU."""
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Management((10, 0)))
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    function = layers.linear_with_grad_accumulation_and_async_allreduce
    monkeypatch.setattr(layers.LinearWithGradAccumulationAndAsyncCommunication, "apply", lambda *arguments: None)

    def warned():
        monkeypatch.setattr(function, "warned", False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            environment.limit_connections(os.environ)
            function(None, None, None, False, True, True, tp_group=object())
        return [str(warning.message) for warning in caught]

    assert warned() == []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert warned()


def test_connections_are_limited_before_cuda_is_asked_anything(monkeypatch):
    """The driver reads the variable when it is initialised, which the first question does."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    seen = []
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")) or False
    )
    spec = importlib.util.spec_from_file_location("mft_megatron.mcore.platform.devices_again", devices.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert seen == ["1"]


@pytest.mark.parametrize("has_cuda", [False, True])
def test_deterministic_algorithms(monkeypatch, has_cuda):
    """Torch's on both devices; the variables and cuDNN's choice on a GPU."""
    variables = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}
    monkeypatch.setattr(devices, "HAS_CUDA", has_cuda)
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        devices.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.benchmark == (not has_cuda)
    changed = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    expected = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"} | (changed if has_cuda else {})
    assert {name: variables.get(name) for name in changed | expected} == dict.fromkeys(changed) | expected


@pytest.mark.parametrize("algorithms", ["NVLS", "Ring,NVLSTree", "nvls"])
def test_sums_in_switches_are_refused_in_deterministic_mode(algorithms):
    with pytest.raises(InputError, match=f"--deterministic-mode with NCCL_ALGO={algorithms} .*unset NCCL_ALGO"):
        environment.allow_deterministic_algorithms_only({"NCCL_ALGO": algorithms})


def test_choices_of_attention_in_the_environment_are_set_aside():
    variables = {"NVTE_FLASH_ATTN": "1", "NVTE_UNFUSED_ATTN": "0", "NVTE_DEBUG": "1"}
    line = environment.set_aside_attention(variables)
    assert line.startswith("NVTE_FLASH_ATTN=1, NVTE_UNFUSED_ATTN=0 of the environment set aside: --attention-backend")
    assert variables == {"NVTE_DEBUG": "1"}
    assert environment.set_aside_attention(variables) is None
