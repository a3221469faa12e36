"""The same seed gives the same weights on every parallel layout, with Megatron's distribution."""

import numpy as np
import pytest
import torch

from tests.batches import one_segment
from tests.command_lines import SMALL
from tests.ranks import run_on_ranks

BASE = (
    f"{SMALL} --group-query-attention --num-query-groups 2 --swiglu "
    "--data-path none --seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 1 --make-vocab-size-divisible-by 64 "
    "--position-embedding-type rope "
)


def _save(folder, extra, world_size):
    """Save the initial weights of this parallel layout as a checkpoint and read them whole."""
    from pathlib import Path

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo

    arguments = parse_arguments((BASE + extra).split(), world_size)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, 100, 1)
        info = CheckpointInfo(0, 0, {}, 100, {}, "", 0, 1)
        path = checkpoint.save(Path(folder), trainer, info, arguments.checkpoint)
        if not process_groups.is_main():
            return None
        reader = TensorReader(path)
        names = sorted(reader.names())
        return {name: reader.read(name) for name in names}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run_on_ranks(1, _save, str(tmp_path_factory.mktemp("one")), "", 1)[0]


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
        (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2"),
    ],
)
def test_layouts_start_from_the_same_weights(one_process, tmp_path, world_size, extra):
    weights = run_on_ranks(world_size, _save, str(tmp_path), extra, world_size)[0]
    assert weights.keys() == one_process.keys()
    for name, weight in weights.items():
        assert weight.equal(one_process[name]), name


def test_distribution_is_megatrons(one_process):
    for name, weight in one_process.items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            residual = "linear_proj" in name or "linear_fc2" in name
            expected = 0.02 / (8**0.5 if residual else 1.0)
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(weight.mean().item()) < expected / 20


def test_no_two_weights_and_no_two_layers_are_equal(one_process):
    layers = [layer for name, weight in one_process.items() if weight.std() > 1e-4 for layer in weight.flatten(1)[:4]]
    first = torch.stack([row[:16] for row in layers])
    assert len(first.unique(dim=0)) == len(layers)


def test_the_seed_matters(one_process, tmp_path):
    other = run_on_ranks(1, _save, str(tmp_path), "--seed 5", 1)[0]
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert not other[name].equal(one_process[name])


def _padding_is_left_out(divisible_by):
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    extra = f"--hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by {divisible_by}"
    arguments = parse_arguments((BASE.replace("--make-vocab-size-divisible-by 64 ", "") + extra).split(), 1)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        model = Trainer(arguments, 100, 1).chunks[0].module.eval()
        from mft_megatron.mcore.parallel.device_batch import to_device

        batch = one_segment(np.arange(32) * 3)
        with torch.no_grad():
            return model.embedding.word_embeddings.weight.shape[0], model.run(to_device(batch))


def test_padding_the_vocabulary_changes_no_loss():
    (small, expected), (large, losses) = (run_on_ranks(1, _padding_is_left_out, size)[0] for size in (4, 256))
    assert (small, large) == (100, 256)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
