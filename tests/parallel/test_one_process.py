"""One process agrees with docs/LOSSES.md, computed in fp64: loss, gradient norm and gradients of every loss."""

import functools

import numpy as np
import pytest

from tests.made_dataset import batch_of_packs
from tests.parallel.modes import MODES, TOLERANCE, assert_same_gradients, assert_same_step, smallest_difference
from tests.parallel.run import arguments_for, data_seed, open_dataset, plans_of, train_in_modes
from tests.ranks import run_on_ranks


def _micro_batch_normalisation(prefix):
    modes = {
        mode: f"{options} --mft-normalization micro-batch"
        for mode, options in MODES.items()
        if "focal" not in mode and "epoch" not in mode
    }
    once = dict.fromkeys(modes, 1)
    return {size: train_in_modes(prefix, f"--micro-batch-size {size}", 1, modes, once) for size in (1, 4, 8)}


def test_micro_batch_normalisation_is_not_invariant(dataset_prefix):
    """It depends on the micro-batch size, unlike the losses of the layout matrix; for one micro-batch it is theirs."""
    by_size = run_on_ranks(1, _micro_batch_normalisation, dataset_prefix)[0]
    once = {mode: options for mode, options in MODES.items() if mode in by_size[8]}
    expected = run_on_ranks(1, train_in_modes, dataset_prefix, "", 1, once, dict.fromkeys(once, 1))[0]
    for mode, (record,) in expected.items():
        assert_same_step([by_size[8][mode][0]], record, mode)
        for what in ("loss", "grad_norm"):
            assert smallest_difference([by_size[size][mode][0][what] for size in (1, 4, 8)]) > 10 * TOLERANCE


def _reference_objective(mode, samples, weight_K, gamma, detach, before, epoch=None):
    """Compute the objective of docs/LOSSES.md in torch, fp64, to be differentiated.

    Args:
        samples: (task, token losses, weights of their turns, weight of the sample) of each sample.
        before: (P, Q) of each task, statistics of earlier steps.
        epoch: with ``--mft-normalization epoch`` the same samples of the epoch, and P / G.

    Returns:
        the objective, and the statistics of this step.
    """

    def mean(values, weights):
        return sum(weight * value for value, weight in zip(values, weights, strict=True)) / sum(weights)

    present = sorted({task for task, *_ in samples})
    of_task = {i: [sample for sample in samples if sample[0] == i] for i in present}
    v = {i: [of_sample for *_, of_sample in of_task[i]] for i in present}
    q = {i: [(u * loss).sum() / u.sum() for _, loss, u, _ in of_task[i]] for i in present}
    p = {i: [(u * (-loss).exp()).sum() / u.sum() for _, loss, u, _ in of_task[i]] for i in present}
    statistics = {i: (mean(p[i], v[i]), mean(q[i], v[i])) for i in present}
    # sums over a task's tokens or samples, and what they are divided by
    by_samples = mode in ("sample", "task-sample")
    sums = {i: sum(w * x for w, x in zip(v[i], q[i], strict=True)) for i in present}
    if not by_samples:
        sums = {i: sum(w * (u * loss).sum() for _, loss, u, w in of_task[i]) for i in present}
    whole, times = epoch or (samples, 1.0)
    divisor = {i: 0.0 for i, *_ in whole}
    for i, _, u, w in whole:
        divisor[i] += float(w if by_samples else w * u.sum())
    if mode in ("token", "sample"):
        return times * sum(sums.values()) / sum(divisor.values()), statistics
    if mode in ("task-token", "task-sample"):
        total = sum(weight_K[i] for i in divisor)
        return times * sum(weight_K[i] / total * sums[i] / divisor[i] for i in present), statistics
    value = 0
    for i in present:
        if mode == "focal-sample":
            factors = [(1 - miss) ** gamma for miss in p[i]]
            factors = [factor.detach() for factor in factors] if detach else factors
            part = mean([factor * loss for factor, loss in zip(factors, q[i], strict=True)], v[i])
        elif i not in before:
            part = statistics[i][1]
        else:
            (p_before, q_before), (p_now, q_now) = before[i], statistics[i]
            slope = 0 if detach else gamma * (1 - p_before) ** (gamma - 1) * q_before
            part = (1 - p_before) ** gamma * q_now - slope * p_now
        value = value + weight_K[i] * part / len(present)
    return value, statistics


def _in_fp64(arguments, dataset):
    """Convert the model to fp64, with norms that do not compute in fp32."""
    import torch

    from mft_megatron.mcore.model.gpt import PackedGPTModel
    from mft_megatron.mcore.model.norm import RMSNorm

    model = PackedGPTModel(arguments, dataset.vocab_size).double().eval()
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        norm.forward = functools.partial(
            lambda norm, hidden: torch.nn.functional.rms_norm(hidden, norm.normalized_shape, norm.weight, norm.eps),
            norm,
        )
    return model


def _samples(split, packs, log_p=None):
    """Read (task, token losses, weights of their turns, weight of the sample) of each sample of some packs.

    Args:
        split: of the packs.
        packs: their indices.
        log_p: log probabilities of a pack's tokens; ``None`` where losses are not needed, which are then 0.
    """
    import torch

    samples = []
    for pack in packs:
        batch = batch_of_packs(split, [pack])
        logs = log_p and log_p(batch)
        tokens, mask, u, v = (
            np.ones(batch.tokens_BS.size) if array is None else array[0]
            for array in (batch.tokens_BS, batch.loss_mask_BS, batch.token_weights_BS, batch.sample_weights_BS)
        )
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            targets = [t for t in range(start, end - 1) if mask[t]]
            if targets:
                losses = torch.zeros(len(targets)) if logs is None else -logs[targets, tokens[np.add(targets, 1)]]
                weights = torch.from_numpy(u[targets].astype(np.float64))
                samples.append((int(batch.task_ids_BS[0, start]), losses, weights, float(v[start])))
    return samples


def _log_probabilities(model, dataset, batch):
    """Log probabilities of the words of the vocabulary at each position of a batch of one row, fp64 [S, V]."""
    from mft_megatron.mcore.parallel.device_batch import to_device

    return model.run(to_device(batch), with_loss=False)[0, :, : dataset.vocab_size].log_softmax(-1)


def against_fp64(prefix, modes, steps):
    """Train; return by mode and step the trainer's record and the reference in fp64 at the trainer's weights."""
    import torch

    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.task_weights import initial_weights
    from tests.parallel.run import FOR_GRADIENTS, chosen_gradients
    from tests.reference import reference_epoch_loss, reference_weighted_loss

    arguments = arguments_for(prefix, "", 1)
    dataset = open_dataset(arguments)
    split, pairs = dataset.split("train"), {}
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        exact = _in_fp64(arguments, dataset)
        whole = _samples(split, range(split.num_packs))
        for mode, extra in modes.items():
            arguments = arguments_for(prefix, f"{FOR_GRADIENTS} {extra}", 1)
            options, weight_K = arguments.multi_task, initial_weights(arguments.multi_task, dataset.tasks)
            trainer, before, pairs[mode] = Trainer(arguments, dataset.vocab_size, len(weight_K)), {}, []
            for plan in plans_of(split, data_seed(split), steps):
                exact.load_state_dict(trainer.chunks[0].module.state_dict())
                exact.zero_grad()
                samples = _samples(split, plan.packs_G, functools.partial(_log_probabilities, exact, dataset))
                by_epoch = options.mft_normalization == "epoch"
                value, now = _reference_objective(
                    options.mft_loss,
                    samples,
                    weight_K,
                    options.focal_gamma,
                    options.focal_detach,
                    before,
                    epoch=(whole, split.num_packs / len(plan.packs_G)) if by_epoch else None,
                )
                value.backward()
                before |= {task: (p.item(), q.item()) for task, (p, q) in now.items()}
                gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
                norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
                ours, all_ = (
                    [(task, loss.tolist(), u.tolist(), v) for task, loss, u, v in some] for some in (samples, whole)
                )
                if by_epoch:
                    sizes = len(plan.packs_G), split.num_packs
                    loss = reference_epoch_loss(options.mft_loss, ours, all_, weight_K, *sizes)
                else:
                    loss = reference_weighted_loss(options.mft_loss, ours, weight_K, options.focal_gamma)

                report = trainer.train_step(split, plan, weight_K)
                chosen = {name: gradient for name, (_, _, gradient) in chosen_gradients(trainer).items()}
                book = {name: gradients[_name_in_model(name)].numpy() for name in chosen}
                pairs[mode].append(((report.loss, report.grad_norm, chosen), (loss, norm, book), value.item()))
    return pairs


def _name_in_model(name):
    if name in ("embedding", "output_layer"):
        return {"embedding": "embedding.word_embeddings.weight", "output_layer": "output_layer.weight"}[name]
    _, layer, what = name.split()
    parent = {"linear_fc2": "mlp.", "linear_qkv": "self_attention."}.get(what, "")
    return f"decoder.layers.{int(layer) - 1}.{parent}{what}.weight"


def test_one_process_equals_the_reference_in_fp64(dataset_prefix):
    """Loss, gradient norm and gradients of three steps, each at the trainer's weights before it."""
    for mode, steps in run_on_ranks(1, against_fp64, dataset_prefix, MODES, 3)[0].items():
        for step, ((loss, norm, gradients), (book_loss, book_norm, book_gradients), differentiated) in enumerate(steps):
            where = f"{mode}, step {step + 1}"
            assert loss == pytest.approx(book_loss, rel=TOLERANCE), where
            assert norm == pytest.approx(book_norm, rel=TOLERANCE), where
            assert_same_gradients(gradients, book_gradients, where)
            # the reference in torch, which is differentiated, equals that in numpy, except for focal-task's surrogate
            assert (differentiated == pytest.approx(book_loss, rel=1e-12)) == ("focal-task" not in mode), where
