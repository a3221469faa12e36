"""One process agrees with docs/LOSSES.md, computed in fp64: loss, gradient norm and gradients of every loss."""

import functools

import pytest

from tests.made_dataset import batch_of_packs
from tests.parallel.modes import MODES, TOLERANCE, assert_same_gradients, assert_same_step, smallest_difference
from tests.parallel.run import arguments_for, data_seed, open_dataset, plans_of, train_in_modes
from tests.ranks import run_on_ranks


def _micro_batch_normalisation(prefix):
    modes = {
        mode: f"{options} --mft-normalization micro-batch" for mode, options in MODES.items() if "focal" not in mode
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


def _reference_objective(mode, samples, weight_K, gamma, detach, before):
    """Compute the objective of docs/LOSSES.md in torch, fp64, to be differentiated.

    Args:
        samples: (task, token losses) of each sample.
        before: (P, Q) of each task, statistics of earlier steps.

    Returns:
        the objective, and the statistics of this step.
    """
    import torch

    def mean(values):
        return torch.stack(list(values)).mean()

    present = sorted({task for task, _ in samples})
    losses = {i: [loss for task, loss in samples if task == i] for i in present}
    statistics = {
        i: (mean((-loss).exp().mean() for loss in losses[i]), mean(map(torch.mean, losses[i]))) for i in present
    }
    total = sum(weight_K[i] for i in present)
    if mode == "token":
        return torch.cat([loss for _, loss in samples]).mean(), statistics
    if mode == "sample":
        return mean(loss.mean() for _, loss in samples), statistics
    if mode == "task-token":
        return sum(weight_K[i] * torch.cat(losses[i]).mean() for i in present) / total, statistics
    if mode == "task-sample":
        return sum(weight_K[i] * statistics[i][1] for i in present) / total, statistics
    value = 0
    for i in present:
        if mode == "focal-sample":
            factors = [(1 - (-loss).exp().mean()) ** gamma for loss in losses[i]]
            factors = [factor.detach() for factor in factors] if detach else factors
            part = mean(factor * loss.mean() for factor, loss in zip(factors, losses[i], strict=True))
        elif i not in before:
            part = statistics[i][1]
        else:
            (p, q), (p_now, q_now) = before[i], statistics[i]
            slope = 0 if detach else gamma * (1 - p) ** (gamma - 1) * q
            part = (1 - p) ** gamma * q_now - slope * p_now
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


def _token_losses(model, dataset, split, packs):
    """Compute (task, losses of the supervised tokens) of each sample of some packs, from fp64 logits."""
    from mft_megatron.mcore.parallel.device_batch import to_device

    samples = []
    for pack in packs:
        batch = batch_of_packs(split, [pack])
        logits = model.run(to_device(batch), with_loss=False)[0, :, : dataset.vocab_size]
        log_p = logits.log_softmax(-1)
        tokens, mask = batch.tokens_BS[0], batch.loss_mask_BS[0]
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            targets = [t for t in range(start, end - 1) if mask[t]]
            if targets:
                losses = -log_p[targets, [int(tokens[t + 1]) for t in targets]]
                samples.append((int(batch.task_ids_BS[0, start]), losses))
    return samples


def _against_fp64(prefix, modes, steps):
    """Train; return by mode and step the trainer's record and the reference in fp64 at the trainer's weights."""
    import torch

    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.task_weights import initial_weights
    from tests.parallel.run import FOR_GRADIENTS, chosen_gradients
    from tests.reference import reference_loss

    arguments = arguments_for(prefix, "", 1)
    dataset = open_dataset(arguments)
    split, pairs = dataset.split("train"), {}
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        exact = _in_fp64(arguments, dataset)
        for mode, extra in modes.items():
            arguments = arguments_for(prefix, f"{FOR_GRADIENTS} {extra}", 1)
            options, weight_K = arguments.multi_task, initial_weights(arguments.multi_task, dataset.tasks)
            trainer, before, pairs[mode] = Trainer(arguments, dataset.vocab_size, len(weight_K)), {}, []
            for plan in plans_of(split, data_seed(split), steps):
                exact.load_state_dict(trainer.chunks[0].module.state_dict())
                exact.zero_grad()
                samples = _token_losses(exact, dataset, split, plan.packs_G)
                value, now = _reference_objective(
                    options.mft_loss, samples, weight_K, options.focal_gamma, options.focal_detach, before
                )
                value.backward()
                before |= {task: (p.item(), q.item()) for task, (p, q) in now.items()}
                gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
                norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
                losses = [(task, loss.detach().numpy()) for task, loss in samples]
                loss = reference_loss(options.mft_loss, losses, weight_K, options.focal_gamma)

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
    for mode, steps in run_on_ranks(1, _against_fp64, dataset_prefix, MODES, 3)[0].items():
        for step, ((loss, norm, gradients), (book_loss, book_norm, book_gradients), differentiated) in enumerate(steps):
            where = f"{mode}, step {step + 1}"
            assert loss == pytest.approx(book_loss, rel=TOLERANCE), where
            assert norm == pytest.approx(book_norm, rel=TOLERANCE), where
            assert_same_gradients(gradients, book_gradients, where)
            # the reference in torch, which is differentiated, equals that in numpy, except for focal-task's surrogate
            assert (differentiated == pytest.approx(book_loss, rel=1e-12)) == ("focal-task" not in mode), where
