"""GPU memory of an update and of a save of the optimizer, beside what the rank holds."""

import pytest

MIB = 2**20
LARGE = (
    "--num-layers 4 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 16 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --max-position-embeddings 128 "
    "--lr 1e-3 --train-iters 4 --micro-batch-size 1 --bf16 --global-batch-size 8 --use-distributed-optimizer"
)


def _memory(words, world_size, rank):
    """Bytes of the shard in fp32, and beside what is held those of an update and those of gathering states."""
    import numpy as np

    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.dry_run.rank_run import ANSWERS, group_name
    from mft_megatron.dry_run.step_counters import StepCounters
    from mft_megatron.mcore.checkpointing.checkpoint import _model_state
    from mft_megatron.mcore.optim.checkpointed_state import stored_state
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.platform.simulation import listener
    from mft_megatron.mcore.platform.simulation.device_mode import running
    from mft_megatron.mcore.platform.simulation.process_group import start
    from mft_megatron.mcore.trainer import Trainer
    from tests.dry_run.simulated import arguments_of

    start(rank, world_size)
    arguments = arguments_of(words, world_size)
    dataset = PackedDataset.open(arguments.data.data_path, arguments.data.seq_length)
    with process_groups.process_groups(arguments.distributed, 1), running(ANSWERS):
        counters = StepCounters(group_name)
        listener.listen(counters)
        trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
        plan = plan_step(dataset.split("train"), seed=1, global_batch_size=8, consumed_samples=0)
        trainer.train_step(dataset.split("train"), plan, np.ones(len(dataset.tasks)))
        found = [4 * sum(weight.numel() for chunk in trainer.chunks for weight in chunk.parameters()) // 2]
        weights = _model_state(trainer, True)
        for work in (trainer.optimizer.step, lambda: stored_state(trainer.optimizer, weights)):
            counters.reset()
            before = counters.memory.now
            kept = work()
            found.append(counters.memory.at_peak().peak - before)
        listener.listen(None)
        assert kept["tensors"]
        return found


@pytest.mark.parametrize("rank", [0, 1])
def test_an_update_and_a_save_need_no_copy_of_the_shard(simulation, rank):
    shard, update, save = simulation.report(world_size=2, rank=rank, model=LARGE, function=_memory)
    assert shard > 512 * MIB
    assert update < 4 * MIB  # without a fused Adam the shard once more
    # what is sent and received in two rounds; gathering a bucket took three times the shard
    assert save <= 2 * (128 + 64) * MIB
