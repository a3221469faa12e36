"""Functions that ranks run in tests of the objective's certificate: steps, healthy or with a planted fault."""

import contextlib
import dataclasses

import numpy as np
import pytest

from tests.parallel.run import TASK_WEIGHTS, arguments_for, open_dataset

OPTIONS = "--num-layers 2 --init-method-std 0.2"


def _everything(name):
    return True


def layout_steps(prefix, options, world_size, faults, shape="llama", steps=1):
    """Run steps of the trainer with each fault in turn.

    Returns:
        by fault the steps; and the whole weights by name, on rank 0.
    """
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.whole_tensors import gather_weights
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.verify.objective.steps import first_plans, run_steps

    arguments = arguments_for(prefix, f"{OPTIONS} {options}", world_size, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
        plans, measured = list(first_plans(arguments, split, steps)), {}
        for fault in faults:
            with FAULTS[fault]() as weight_K:
                measured[fault] = run_steps(trainer, split, plans, weight_K, _everything)
        with trainer.weights.whole():
            weights = gather_weights(trainer.chunks)
    assert all(whole.disagreement == 0 for whole in weights.values())
    return measured, {name: whole.value for name, whole in weights.items()}


def reference_steps(prefix, options, world_size, weights, shape="llama", steps=1):
    """Compute the reference of the same steps, in a process of its own.

    Returns:
        the steps, their gradients in the run's precision, and the targets of each.
    """
    from mft_megatron.mcore.reference_model import reference_model
    from mft_megatron.verify.objective.steps import Reference, first_plans

    arguments = arguments_for(prefix, f"{OPTIONS} {options}", world_size, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    plans = list(first_plans(arguments, split, steps))
    reference = Reference(arguments, split, TASK_WEIGHTS, _everything)
    with reference_model(arguments, dataset.vocab_size, weights, arguments.precision.name) as model:
        rounded = [reference.step(model, plan).gradients for plan in plans]
    with reference_model(arguments, dataset.vocab_size, weights) as model:
        return [reference.step(model, plan) for plan in plans], rounded, [reference.targets(plan) for plan in plans]


@contextlib.contextmanager
def healthy():
    yield TASK_WEIGHTS


@contextlib.contextmanager
def wrong_weight():
    yield TASK_WEIGHTS * np.array([1.0, 1.0, 1.01, 1.0])


def _with_batches(change):
    @contextlib.contextmanager
    def fault():
        from mft_megatron.data.loading import micro_batches

        build = micro_batches.build_batch
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(micro_batches, "build_batch", lambda *arguments: change(build, *arguments))
            yield TASK_WEIGHTS

    return fault


def _shifted_mask(build, *arguments):
    batch = build(*arguments)
    return dataclasses.replace(batch, loss_mask_BS=np.roll(batch.loss_mask_BS, -1, axis=1))


def _doubled_sample(build, dataset, rows, width):
    from mft_megatron.data.sample_slices import concatenate_slices

    doubled = [concatenate_slices([row, row.take(slice(0, 1))]) for row in rows]
    return build(
        dataset, [two if two.num_tokens <= width else row for two, row in zip(doubled, rows, strict=True)], width
    )


def _leaking(build, *arguments):
    batch = build(*arguments)
    rows, width = batch.tokens_BS.shape
    return dataclasses.replace(batch, cu_seqlens=np.arange(rows + 1, dtype=np.int32) * width, max_seqlen=width)


def _other_labels(build, *arguments):
    """Let the last position of each sample predict the next sample's first token, which is no target."""
    batch = build(*arguments)
    tokens = batch.tokens_BS.ravel()
    labels, mask = batch.labels_BS.copy().ravel(), batch.loss_mask_BS.copy().ravel()
    last = batch.cu_seqlens[1:-1] - 1
    labels[last], mask[last] = tokens[last + 1], 1
    shape = batch.tokens_BS.shape
    return dataclasses.replace(batch, labels_BS=labels.reshape(shape), loss_mask_BS=mask.reshape(shape))


@contextlib.contextmanager
def counted_twice():
    """Count the gradients of keys and values that context-parallel ranks send each other twice."""
    from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard

    gather = ContextParallelShard.gather

    def doubled(shard, key, value):
        for tensor in (key, value):
            tensor.register_hook(lambda gradient: 2 * gradient)
        return gather(shard, key, value)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ContextParallelShard, "gather", doubled)
        yield TASK_WEIGHTS


def averaged():
    """Average gradients over data-parallel ranks, as Megatron does by default."""
    return _scaled_gradients(0.5)


def not_finite():
    """Make gradients NaN, and no loss."""
    return _scaled_gradients(float("nan"))


@contextlib.contextmanager
def _scaled_gradients(factor):
    """Multiply all gradients by a factor after ranks have summed them."""
    from mft_megatron.mcore import trainer

    finalize = trainer.finalize_model_grads

    def scaled(model, *arguments, **options):
        finalize(model, *arguments, **options)
        for chunk in model:
            chunk.scale_gradients(factor)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "finalize_model_grads", scaled)
        yield TASK_WEIGHTS


FAULTS = {
    "none": healthy,
    "wrong weight": wrong_weight,
    "mask off by one": _with_batches(_shifted_mask),
    "label of the next sample": _with_batches(_other_labels),
    "doubled sample": _with_batches(_doubled_sample),
    "attention leak": _with_batches(_leaking),
    "context-parallel gradient counted twice": counted_twice,
    "gradients averaged": averaged,
    "gradients that are not finite": not_finite,
}
