"""The precision-aware optimizer with a stand-in of Transformer Engine's fused Adam: its checkpoints are any other's."""

import pytest
import torch

from mft_megatron.run_folder.found import latest_checkpoint
from tests.parallel.run import arguments_for, trainer_and_split
from tests.parallel.test_checkpoints_of_distributed_optimizer import _load, _save, _step
from tests.ranks import run_on_ranks
from tests.saved_checkpoints import tensors_of

PLAIN = "--bf16 --micro-batch-size 2"
PRECISE = f"{PLAIN} --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 30001"
PRECISE += " --use-precision-aware-optimizer"
DTYPES = {
    "remainders": "--overlap-param-gather",
    "remainders, not overlapped": "",
    "fp16 main weights": "--main-params-dtype fp16",
    "bf16 moments": "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --main-grads-dtype bf16",
    "fp8 moments": "--exp-avg-dtype fp8 --exp-avg-sq-dtype fp16",
}


def weights_of(trainer):
    with trainer.weights.whole():
        return [weight.detach().clone() for chunk in trainer.chunks for weight in chunk.parameters()]


def _write_plain(prefix, folder):
    """Train without the distributed optimizer and save; all main weights of one matrix are halfway between weights."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, PLAIN, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, PLAIN, 1)
        for number in range(2):
            _step(trainer, split, number)
        weight = max(trainer.chunks[0].parameters(), key=lambda weight: weight.numel())
        bits = weight.main_param.data.view(torch.int32)
        bits.copy_((bits & -0x10000) | 0x8000)
        weight.data.copy_(weight.main_param)
        _save(trainer, folder, 2)


def _copy_plain(prefix, source, target):
    """Load without the distributed optimizer and save."""
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, PLAIN, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, _ = trainer_and_split(prefix, f"{PLAIN} --seed 77", 1)
        _load(trainer, source)
        _save(trainer, target, 2)


def _precise(prefix, options, folder):
    """Train, save after two steps and resume; load the plain optimizer's checkpoint and save it."""
    from mft_megatron.mcore.parallel import process_groups
    from tests import fake_fused_adam

    fake_fused_adam.install()
    arguments = arguments_for(prefix, options, 2)
    with process_groups.process_groups(arguments.distributed, 1):
        whole, split = trainer_and_split(prefix, options, 2)
        (part,) = whole.optimizer.chained_optimizers
        assert isinstance(part.optimizer, fake_fused_adam.FusedAdam)
        for number in range(2):
            _step(whole, split, number)
        _save(whole, f"{folder}/own", 2)
        resumed, _ = trainer_and_split(prefix, f"{options} --seed 77", 2)
        _load(resumed, f"{folder}/own")
        _save(resumed, f"{folder}/own again", 2)
        curves = [_step(trainer, split, 2) for trainer in (whole, resumed)]
        other, _ = trainer_and_split(prefix, f"{options} --seed 77", 2)
        _load(other, f"{folder}/plain")
        loaded = weights_of(other)
        _save(other, f"{folder}/plain again", 2)
        dtypes = {str(state.dtype) for states in part.optimizer.state.values() for state in states.values()}
        return curves, [weights_of(whole), weights_of(resumed)], loaded, dtypes


def saved(folder):
    return tensors_of(latest_checkpoint(folder).path)


@pytest.mark.parametrize(
    "dtypes", ["remainders", *(pytest.param(name, marks=pytest.mark.slow) for name in list(DTYPES)[1:])]
)
def test_it_resumes_and_loads_and_is_loaded_by_any_other(dataset_prefix, tmp_path, dtypes):
    options, exact = f"{PRECISE} {DTYPES[dtypes]}", "remainders" in dtypes
    run_on_ranks(1, _write_plain, dataset_prefix, str(tmp_path / "plain"))
    ranks = run_on_ranks(2, _precise, dataset_prefix, options, str(tmp_path))
    run_on_ranks(1, _copy_plain, dataset_prefix, str(tmp_path / "own"), str(tmp_path / "own copied"))
    curves, weights, _, kept = ranks[0]
    assert ("torch.int16" in kept) == ("--main-params-dtype" not in options)
    assert curves[1] == (curves[0] if exact else pytest.approx(curves[0], rel=1e-3))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-4)
    for one, other in zip(*(rank[2] for rank in ranks), strict=True):
        assert one.equal(other)  # data-parallel ranks have the same weights
    own, copied, again = (saved(tmp_path / name) for name in ("own", "own copied", "own again"))
    for name, value in own.items():
        assert copied[name].equal(value), name
        torch.testing.assert_close(again[name], value, rtol=0 if exact else 1e-6, atol=0)
    plain, again = saved(tmp_path / "plain"), saved(tmp_path / "plain again")
    halves = 0
    for name, value in plain.items():
        if name.startswith("optimizer.state.fp32_param"):
            # the weight is the nearest to the main weight in bf16, which is not just the weight
            weight = own[name.removeprefix("optimizer.state.fp32_param.")].float()
            assert (own[name] - weight).abs().max() <= 2**-8 * weight.abs().max()
            assert not own[name].equal(weight)
            halves += ((value.view(torch.int32) & 0xFFFF) == 0x8000).sum()
        if exact and name.startswith("optimizer"):
            assert again[name].equal(value), name
    assert halves > 10_000
