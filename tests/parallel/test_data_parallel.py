"""Gradients are reduced and weights gathered at the right time, and read only afterwards."""

import numpy as np
import pytest

from tests.parallel.run import arguments_for, plans_of, trainer_and_split
from tests.ranks import run_on_ranks

REDUCE = "--overlap-grad-reduce --ddp-bucket-size 30001"
OVERLAP = f"--use-distributed-optimizer {REDUCE} --overlap-param-gather"


def _groups(prefix, options, world):
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, options, world)
    return process_groups.process_groups(arguments.distributed, 1)


def _reductions(prefix, options, shape):
    """Record for each bucket of the second step whether it was complete when it was reduced, and the order."""
    import torch
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    seen, start = [], Group.start_grad_sync

    def watched(self, *args, **kwargs):
        seen.append((self, [bucket.grad_data.clone() for bucket in self.buckets]))
        return start(self, *args, **kwargs)

    with _groups(prefix, options, 1):
        trainer, split = trainer_and_split(prefix, options, 1, shape)
        plans = plans_of(split, 1, 2)
        trainer.train_step(split, plans[0], np.ones(4))
        Group.start_grad_sync = watched
        chunk, before_embedding = trainer.chunks[0], []
        embedding = chunk.module.embedding.word_embeddings.weight
        embedding.register_hook(lambda gradient: before_embedding.append(len(seen)))
        trainer.train_step(split, plans[1], np.ones(4))
        complete = [
            all(torch.equal(copy, bucket.grad_data) for copy, bucket in zip(copies, group.buckets, strict=True))
            for group, copies in seen
        ]
        empty = [not any(copy.any() for copy in copies) for _, copies in seen]
        return complete, empty, before_embedding, len(chunk.bucket_groups)


@pytest.mark.parametrize("entropy", ["fused-linear", pytest.param("megatron", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ["llama", "tied"])
def test_a_bucket_is_reduced_once_and_when_its_gradients_are_there(dataset_prefix, entropy, shape):
    """On one rank, a bucket has its final content when it is reduced, and the backward pass continues meanwhile."""
    options = f"{REDUCE} --cross-entropy-impl {entropy} --clip-grad 1e9"  # clipping would scale gradients in place
    complete, empty, before_embedding, buckets = run_on_ranks(1, _reductions, dataset_prefix, options, shape)[0]
    assert buckets > 3
    assert complete == [True] * buckets
    assert not any(empty)
    # four micro-batches: nothing is reduced in the first three; in the last some buckets are reduced early
    assert before_embedding[:-1] == [0] * 3
    assert 0 < before_embedding[-1] < buckets


def _whole(prefix, options):
    """Record a rank's weights before, within and after ``weights.whole()``, and whether forward passes gather."""
    import hashlib

    def state(trainer):
        weights = [weight.detach().numpy().tobytes() for weight in trainer.chunks[0].parameters()]
        return hashlib.sha256(b"".join(weights)).hexdigest(), bool(trainer.chunks[0].remove_forward_pre_hook_handles)

    with _groups(prefix, options, 2):
        trainer, split = trainer_and_split(prefix, options, 2)
        facts = [state(trainer)]
        plan = plans_of(split, 1, 1)[0]
        trainer.train_step(split, plan, np.ones(4))
        facts.append(state(trainer))
        with trainer.weights.whole():
            facts.append(state(trainer))
        facts.append(state(trainer))
        return facts


def test_weights_are_whole_where_they_are_read(dataset_prefix):
    ours, theirs = run_on_ranks(2, _whole, dataset_prefix, OVERLAP)
    assert [gathers for _, gathers in ours] == [False, True, False, True]
    # weights are whole at first and within; after a step each rank has updated only its shard
    assert [one == other for (one, _), (other, _) in zip(ours, theirs, strict=True)] == [True, False, True, True]
    for facts in run_on_ranks(2, _whole, dataset_prefix, "--use-distributed-optimizer"):
        assert [gathers for _, gathers in facts] == [False] * 4
        assert facts[1:] == [facts[1]] * 3


def test_a_step_that_overflows_turns_no_gathering_on(dataset_prefix):
    for facts in run_on_ranks(2, _whole, dataset_prefix, f"{OVERLAP} --fp16"):
        assert [gathers for _, gathers in facts] == [False] * 4


def _evaluated(prefix, options):
    """Evaluate between two steps; return the evaluation's losses and the loss of the second step."""
    with _groups(prefix, options, 2):
        trainer, split = trainer_and_split(prefix, options, 2)
        plans = plans_of(split, 1, 3)
        trainer.train_step(split, plans[0], np.ones(4))
        evaluated = trainer.evaluate(split, plans[1:2], np.ones(4)).loss_K.tolist()
        return evaluated, trainer.train_step(split, plans[2], np.ones(4)).loss


def test_an_evaluation_between_steps_sees_the_weights(dataset_prefix):
    expected, after = run_on_ranks(2, _evaluated, dataset_prefix, "")[0]
    for losses, then in run_on_ranks(2, _evaluated, dataset_prefix, OVERLAP):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert then == pytest.approx(after, rel=1e-6)
