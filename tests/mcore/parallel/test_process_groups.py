"""Process groups of several ranks: ranks of context parallelism, collectives, random numbers."""

import numpy as np
import pytest
import torch

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import BAD_INPUT, DIVERGED
from mft_megatron.mcore.model.parameters import count_parameters
from tests.ranks import run_on_ranks


def _parallel_layout():
    """This rank in data parallelism, the parallel layout, and the parameters of a linear layer."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(context_parallel_size=2), seed=1):
        return process_groups.ranks(), process_groups.parallel_layout(), count_parameters([torch.nn.Linear(3, 5)])


def test_context_parallel_ranks_have_one_data_parallel_rank():
    """Four ranks, two of which have the same data: parameters are counted once, the layout has both sizes."""
    results = run_on_ranks(4, _parallel_layout)
    assert [(ranks.data_rank, ranks.data_size) for ranks, _, _ in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert {(layout["context"], layout["data"]) for _, layout, _ in results} == {(2, 2)}
    assert {parameters for _, _, parameters in results} == {20}


def _collectives():
    """Results of the collectives on this rank, and an array that was summed."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(), seed=1):
        rank = torch.distributed.get_rank()
        array = np.array([rank, 10])
        return {
            "main": process_groups.is_main(),
            "sum over data": process_groups.sum_over_data(array).tolist(),
            "array": array.tolist(),
            "sum over world": process_groups.sum_over_world(torch.tensor([1.0 + rank])).tolist(),
            "any": [process_groups.any_rank(rank == 1), process_groups.any_rank(False)],
            "broadcast": process_groups.broadcast_from_main(torch.tensor([7.0 + rank])).tolist(),
        }


def test_collectives():
    results = run_on_ranks(2, _collectives)
    for rank, result in enumerate(results):
        assert result == {
            "main": rank == 0,
            "sum over data": [1, 20],
            "array": [rank, 10],  # it is not summed in place
            "sum over world": [3.0],
            "any": [True, False],
            "broadcast": [7.0],
        }


def _started_by_srun():
    """This rank's sum over the world, with the variables of srun instead of torchrun's."""
    import os

    from mft_megatron import launcher
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    rank, size = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": os.environ.pop("LOCAL_RANK"), "SLURM_STEP_NUM_TASKS": size}
    os.environ |= {"SLURM_STEP_NODELIST": os.environ.pop("MASTER_ADDR")}
    launcher.complete(os.environ)
    with process_groups.process_groups(DistributedArguments(), seed=1):
        return process_groups.sum_over_world(torch.tensor([1.0 + int(rank)])).tolist()


def test_processes_of_srun_are_ranks():
    assert run_on_ranks(2, _started_by_srun) == [[3.0], [3.0]]


def _seeds():
    """This rank's tensor-parallel and pipeline rank, random numbers outside and within a fork, and a sum over data."""
    from megatron.core import parallel_state, tensor_parallel

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    sizes = DistributedArguments(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with process_groups.process_groups(sizes, seed=1):
        outside = torch.rand(1).item()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            within = torch.rand(1).item()
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return tensor_rank, stage, outside, within, process_groups.sum_over_data(np.array([3])).tolist()


def test_random_numbers_differ_between_stages_and_within_forks():
    """Tensor-parallel ranks sample the same numbers except within a fork; model-parallel ranks add no data."""
    results = run_on_ranks(4, _seeds)
    assert sorted(result[:2] for result in results) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    outside = {(stage, number) for _, stage, number, _, _ in results}
    assert len(outside) == len({number for _, number in outside}) == 2
    assert len({within for *_, within, _ in results}) == 4
    assert all(total == [3] for *_, total in results)


def test_the_refusal_of_any_rank_is_raised(monkeypatch):
    from mft_megatron.mcore.parallel import process_groups

    def gather(refusals, mine):
        assert mine is None
        refusals[:] = [None, ("of the second", DIVERGED), ("of the third", BAD_INPUT)]

    monkeypatch.setattr(process_groups, "any_rank", lambda value: True)
    monkeypatch.setattr(process_groups.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(process_groups.dist, "all_gather_object", gather)
    with pytest.raises(InputError, match=r"^of the second$") as refusal:
        process_groups.raise_on_all_ranks(None)
    assert refusal.value.code == DIVERGED


def test_ranks_that_cannot_connect_are_refused_with_the_reason(monkeypatch):
    from mft_megatron.mcore.parallel import process_groups

    def fail(value):
        raise torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage\nLast error:\nDuplicate GPU detected : rank 1"
        )

    monkeypatch.setattr(process_groups, "any_rank", fail)
    with pytest.raises(InputError, match=r"cannot connect to each other: Duplicate GPU detected : rank 1") as refusal:
        process_groups._connect()
    assert refusal.value.always


def _refused_at_the_start():
    """The refusal of a rank that cannot connect, and whether it has left the group of all ranks."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    def refuse():
        raise InputError("no way to the others")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_groups, "_connect", refuse)
        try:
            with process_groups.process_groups(DistributedArguments(), seed=1):
                return "started", torch.distributed.is_initialized()
        except InputError as refusal:
            return str(refusal), torch.distributed.is_initialized()


def test_ranks_connect_before_anything_else():
    assert run_on_ranks(1, _refused_at_the_start) == [("no way to the others", False)]
