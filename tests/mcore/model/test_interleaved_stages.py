"""Interleaved pipelines: the contents of each rank's chunks, and unbatched messages."""

import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.mcore.model.config import transformer_config
from mft_megatron.mcore.platform import devices
from tests.ranks import run_on_ranks

BASE = (
    "--num-layers 8 --hidden-size 32 --num-attention-heads 2 --data-path none --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 2 --train-iters 1 --lr 1"
)
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"


def _parts(extra, world_size):
    """Contents of this rank's chunks, parameters of the whole model, and the parallel layout."""

    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = parse_arguments(f"{BASE} {extra}".split(), world_size)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer = Trainer(arguments, 100, 1)
        models = [chunk.module for chunk in trainer.chunks]
        layers = [[layer.layer_number for layer in model.decoder.layers] for model in models]
        ends = [(model.pre_process, model.post_process) for model in models]
        return layers, ends, trainer.num_parameters(), process_groups.parallel_layout()


def test_what_each_rank_holds():
    (_, _, parameters, _) = run_on_ranks(1, _parts, "", 1)[0]
    first, last = run_on_ranks(2, _parts, VPP2, 2)
    assert (first[0], last[0]) == ([[1, 2], [5, 6]], [[3, 4], [7, 8]])
    assert (first[1], last[1]) == ([(True, False), (False, False)], [(False, False), (False, True)])
    assert first[2] == last[2] == parameters
    plain = run_on_ranks(2, _parts, PP2, 2)[0]
    assert plain[0] == [[1, 2, 3, 4]]
    assert plain[3] != first[3]  # random-number states of one parallel layout are not those of the other


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_interleaved_stages_never_batch_their_messages(monkeypatch, backend):
    """Batched messages would give wrong results, see tests/parallel/test_layouts.py."""
    monkeypatch.setattr(devices, "HAS_CUDA", backend == "nccl")
    plain, interleaved = (
        transformer_config(parse_arguments(f"{BASE} {layout} --distributed-backend {backend}".split(), 2))
        for layout in (PP2, VPP2)
    )
    assert plain.batch_p2p_comm == (backend == "nccl")
    assert not interleaved.batch_p2p_comm
    assert (plain.overlap_p2p_comm, interleaved.overlap_p2p_comm) == (False, True)
    assert not plain.batch_p2p_sync  # otherwise the host waits for the whole device after every message
