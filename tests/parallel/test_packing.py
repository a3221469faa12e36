"""Token losses of packed rows equal a numpy reference and unpacked rows, and ignore other samples of the pack."""

import dataclasses

import numpy as np
import pytest

from mft_megatron.loss_names import LOSSES
from tests.batches import one_segment
from tests.made_dataset import batch_of_packs
from tests.parallel.run import arguments_for, data_seed, open_dataset, plans_of
from tests.ranks import run_on_ranks


def _model(prefix):
    from mft_megatron.mcore.model.gpt import PackedGPTModel
    from mft_megatron.mcore.model.initialize import initialize_weights

    arguments = arguments_for(prefix, "", 1)
    dataset = open_dataset(arguments)
    model = PackedGPTModel(arguments, dataset.vocab_size)
    initialize_weights(model, arguments.initialization.seed, arguments.initialization.init_method_std)
    return arguments, dataset, model.eval()


def _token_losses(model, batch):
    """Losses of all tokens, supervised or not."""
    import torch

    from mft_megatron.mcore.parallel.device_batch import to_device

    batch = dataclasses.replace(batch, loss_mask_BS=np.ones_like(batch.loss_mask_BS))
    with torch.no_grad():
        return model.run(to_device(batch)).view(batch.tokens_BS.shape).numpy()


def _in_process_groups(function, prefix):
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(arguments_for(prefix, "", 1).distributed, seed=1):
        return function(*_model(prefix))


def _crowded_rows(dataset):
    """The last packs, which hold the shortest samples."""
    split = dataset.split("train")
    return batch_of_packs(split, np.arange(split.num_packs - 6, split.num_packs))


def _packed_and_single(arguments, dataset, model):
    batch = _crowded_rows(dataset)
    packed = _token_losses(model, batch).ravel()
    worst, seen = 0.0, 0
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        if batch.loss_mask_BS.ravel()[start:end].any():
            unpacked = _token_losses(model, one_segment(batch.tokens_BS.ravel()[start:end])).ravel()
            worst = max(worst, float(np.abs(unpacked[:-1] - packed[start : end - 1]).max()))
            seen += 1
    return worst, seen


def test_packed_equals_unpacked(dataset_prefix):
    worst, seen = run_on_ranks(1, _in_process_groups, _packed_and_single, dataset_prefix)[0]
    assert seen > 10
    assert worst < 5e-6


def _with_other_neighbours(arguments, dataset, model):
    batch = _crowded_rows(dataset)
    segments = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False))
    supervised = [n for n, (a, b) in enumerate(segments) if batch.loss_mask_BS.ravel()[a:b].any()]
    before = _token_losses(model, batch).ravel()
    changes = []
    for keep in supervised:
        start, end = segments[keep]
        tokens = np.random.default_rng(keep).integers(0, dataset.vocab_size, batch.tokens_BS.size)
        tokens[start:end] = batch.tokens_BS.ravel()[start:end]
        other = dataclasses.replace(batch, tokens_BS=tokens.reshape(batch.tokens_BS.shape))
        after = _token_losses(model, other).ravel()
        changes.append((bool((after[start:end] == before[start:end]).all()), bool((after != before).any())))
    return changes


def test_a_sample_never_sees_its_neighbours(dataset_prefix):
    changes = run_on_ranks(1, _in_process_groups, _with_other_neighbours, dataset_prefix)[0]
    assert len(changes) > 10
    assert all(own_equal for own_equal, _ in changes)
    assert all(others_changed for _, others_changed in changes)


def _reference_losses(arguments, dataset, model):
    """Compute (task, token losses in fp64 from the model's logits) of every sample of the first global batch."""
    import torch

    from mft_megatron.mcore.parallel.device_batch import to_device

    split = dataset.split("train")
    plan = plans_of(split, data_seed(split))[0]
    samples = []
    for pack in plan.packs_G:
        batch = batch_of_packs(split, [pack])
        with torch.no_grad():
            logits = model.run(to_device(batch), with_loss=False)[0, :, : dataset.vocab_size].double().numpy()
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= logits.max(-1, keepdims=True)
        tokens, mask = batch.tokens_BS[0], batch.loss_mask_BS[0]
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            targets = [t for t in range(start, end - 1) if mask[t]]
            task = int(batch.task_ids_BS[0, start])
            samples.append((task, [-log_p[t, tokens[t + 1]] for t in targets]))
    return samples


@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_equals_the_reference(dataset_prefix, loss):
    from tests.parallel.run import train
    from tests.reference import reference_loss

    samples = run_on_ranks(1, _in_process_groups, _reference_losses, dataset_prefix)[0]
    weights = (1.0, 2.0, 0.5, 3.0)
    assert {task for task, tokens in samples if tokens} == {0, 1, 2, 3}
    curve, _ = run_on_ranks(1, train, dataset_prefix, f"--mft-loss {loss}", 1, weights, 1)[0]
    assert curve[0][0] == pytest.approx(reference_loss(loss, samples, weights), rel=1e-6)
