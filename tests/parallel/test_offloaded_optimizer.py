"""States in the host's memory: the optimizer beside them, and checkpoints. bf16 tensors count as the GPU's here."""

import contextlib
import functools
from unittest import mock

import torch

from tests.parallel.run import arguments_for, trainer_and_split
from tests.parallel.test_checkpoints_of_distributed_optimizer import _load, _save, _step
from tests.parallel.test_precision_aware_optimizer import PLAIN, PRECISE, saved, weights_of
from tests.ranks import run_on_ranks

OFFLOADED = f"{PRECISE} --optimizer-cpu-offload"


@contextlib.contextmanager
def _as_with_cuda():
    """Build optimizers as where there is CUDA, which offloading needs."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    from mft_megatron.mcore import trainer
    from mft_megatron.mcore.platform import devices

    def within(function, *patches):
        def patched(*arguments):
            with contextlib.ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch())
                return function(*arguments)

        return patched

    def not_pinned(*shape, pin_memory, **options):
        return torch.zeros(*shape, **options)

    cuda = functools.partial(mock.patch.object, devices, "HAS_CUDA", True)
    of_gpu = property(lambda tensor: tensor.dtype == torch.bfloat16)
    on_gpu = functools.partial(mock.patch.object, torch.Tensor, "is_cuda", of_gpu)
    pin = functools.partial(mock.patch.object, torch.Tensor, "pin_memory", lambda tensor: tensor)
    empty = functools.partial(mock.patch.object, torch, "empty", not_pinned)
    hybrid = HybridDeviceOptimizer
    with (
        mock.patch.object(trainer, "build_optimizer", within(trainer.build_optimizer, cuda)),
        mock.patch.object(hybrid, "_init_sub_optimizers", within(hybrid._init_sub_optimizers, on_gpu, pin)),
        mock.patch.object(hybrid, "_set_sub_optimizer_grads", within(hybrid._set_sub_optimizer_grads, empty)),
    ):
        yield


def _classes(prefix, option, patched):
    """Classes for states in the host's memory and on the GPU, where Transformer Engine has an Adam."""
    from mft_megatron.mcore.optim import optimizer
    from mft_megatron.mcore.parallel import process_groups
    from tests import fake_fused_adam

    fake_fused_adam.install()
    if not patched:
        optimizer.torch_adam_for_offloading = contextlib.nullcontext
    arguments = arguments_for(prefix, f"{OFFLOADED} {option}", 1)
    with process_groups.process_groups(arguments.distributed, 1), _as_with_cuda():
        trainer, _ = trainer_and_split(prefix, f"{OFFLOADED} {option}", 1)
        defaults = trainer.optimizer.chained_optimizers[0].optimizer.defaults
        return [defaults[f"{where}_optimizer_cls"].__name__ for where in ("cpu", "gpu")]


def test_torchs_adam_on_the_gpu_is_chosen(dataset_prefix):
    option = "--use-torch-optimizer-for-cpu-offload"
    assert run_on_ranks(1, _classes, dataset_prefix, "", True)[0] == ["AdamW", "FusedAdam"]
    assert run_on_ranks(1, _classes, dataset_prefix, option, True)[0] == ["AdamW", "AdamW"]


def test_megatron_forgets_the_option(dataset_prefix):
    option = "--use-torch-optimizer-for-cpu-offload"
    assert run_on_ranks(1, _classes, dataset_prefix, option, False)[0] == ["AdamW", "FusedAdam"]


def _plain(prefix, source, target, steps):
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, PLAIN, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, PLAIN, 1)
        if source:
            _load(trainer, source)
        for number in range(steps):
            _step(trainer, split, number)
        _save(trainer, target, 2)


def _offloaded(prefix, folder):
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, OFFLOADED, 2)
    with process_groups.process_groups(arguments.distributed, 1), _as_with_cuda():
        whole, split = trainer_and_split(prefix, OFFLOADED, 2)
        for number in range(2):
            _step(whole, split, number)
        _save(whole, f"{folder}/own", 2)
        resumed, _ = trainer_and_split(prefix, f"{OFFLOADED} --seed 77", 2)
        _load(resumed, f"{folder}/own")
        curves = [_step(trainer, split, 2) for trainer in (whole, resumed)]
        other, _ = trainer_and_split(prefix, f"{OFFLOADED} --seed 77", 2)
        _load(other, f"{folder}/plain")
        _save(other, f"{folder}/plain again", 2)
        return curves, [weights_of(whole), weights_of(resumed)]


def test_checkpoints_are_those_of_any_other(dataset_prefix, tmp_path):
    run_on_ranks(1, _plain, dataset_prefix, None, str(tmp_path / "plain"), 2)
    curves, weights = run_on_ranks(2, _offloaded, dataset_prefix, str(tmp_path))[0]
    run_on_ranks(1, _plain, dataset_prefix, str(tmp_path / "own"), str(tmp_path / "own again"), 0)
    assert curves[0] == curves[1]
    assert all(one.equal(other) for one, other in zip(*weights, strict=True))
    for name in ("own", "plain"):
        one, other = saved(tmp_path / name), saved(tmp_path / f"{name} again")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
