"""Functions that the ranks of a test run: short runs with the trainer."""

import numpy as np

from tests.parallel.layouts import SHAPES

RUN = (
    "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 128 --init-method-std 0.02 "
    "--seq-length 128 --train-iters 5 --lr 1e-3 --global-batch-size 8"
)
# For comparing gradients: clipping would scale them in place; with a small epsilon Adam would divide gradients near 0,
# which are rounding errors, by their size; and larger initial weights make the losses of tokens differ more.
FOR_GRADIENTS = "--clip-grad 1e9 --adam-eps 1e-4 --init-method-std 0.05"
# weights of the four tasks, all different
TASK_WEIGHTS = np.array([1.0, 2.0, 0.5, 3.0])
BY_TASK = ("loss_K", "tokens_K", "objective_K", "share_K")


def arguments_for(prefix, extra, world_size, shape="llama"):
    """Parse the options of a short run on a model of :data:`layouts.SHAPES`; the last of repeated options counts."""
    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.data.loading.dataset import training_packs

    words = f"{SHAPES[shape]} {RUN} --data-path {prefix} {extra}"
    if "--num-train-epochs" in extra:
        words = words.replace("--train-iters 5", "")
    if "--micro-batch-size" not in words:
        words += " --micro-batch-size 2"
    return parse_arguments(words.split(), world_size, training_packs=training_packs)


def open_dataset(arguments):
    """Open the data set of ``--data-path``."""
    from mft_megatron.data.loading.dataset import PackedDataset

    return PackedDataset.open(arguments.data.data_path, arguments.data.seq_length)


def trainer_and_split(prefix, options, world_size, shape="llama"):
    """Build a trainer, within process groups, and return it with the training split."""
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, options, world_size, shape)
    dataset = open_dataset(arguments)
    return Trainer(arguments, dataset.vocab_size, 4), dataset.split("train")


def data_seed(split):
    """Find a seed whose global batches of 8 lack tasks in all cases of :func:`lacks_tasks`; 1 if there is none.

    The seed is searched for because the order of the data depends on every detail of their preprocessing.
    """
    seeds = (seed for seed in range(1, 3000) if begins_well(plans_of(split, seed, steps=1)[0], split))
    return next((seed for seed in seeds if lacks_tasks(plans_of(split, seed), split)), 1)


def begins_well(plan, split):
    """Whether the first step has all tasks, and packs that differ in their number of samples; quick, for most seeds."""
    if not plan.counts.tokens_K.all():
        return False
    return len({split.counts(plan.packs_G[[row]])[1].sum() for row in range(len(plan.packs_G))}) > 1


def plans_of(split, seed, steps=5):
    """Plan the first steps, with global batches of 8."""
    from mft_megatron.data.loading.step_plan import plan_step

    return [plan_step(split, seed=seed, global_batch_size=8, consumed_samples=8 * step) for step in range(steps)]


def lacks_tasks(plans, split):
    """Whether five steps have all cases that the layout matrix tests.

    Supervised tokens of the tasks are unequal. The last task is in the first, third and fifth global batches alone, and
    all others are in every one. In each step some task is missing from a micro-batch of each rank, and in the first
    three steps some task is missing from all micro-batches of a rank.
    """
    from mft_megatron.batch import Ranks
    from mft_megatron.data.loading.step_plan import shard_plan

    tokens = np.array([plan.counts.tokens_K for plan in plans])
    present, last = tokens > 0, split.num_tasks - 1
    if present[:, last].tolist() != [True, False, True, False, True] or not present[:, :last].all():
        return False
    if any(len(set(tokens_K)) < split.num_tasks for tokens_K in tokens):
        return False
    for data_size, micro_batch_size in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
        counts = [
            [
                [
                    split.counts(packs_B)[0]
                    for packs_B in plan.packs_G[shard_plan(plan, Ranks(rank, data_size), micro_batch_size, False)]
                ]
                for rank in range(data_size)
            ]
            for plan in plans
        ]  # [steps, ranks, micro-batches, K]
        missing = (np.array(counts) == 0) & present[:, None, None]
        if not missing.any((2, 3)).all() or (data_size > 1 and not missing[:3].all(2).any()):
            return False
    return True


def train(prefix, extra, world_size, weights=TASK_WEIGHTS, steps=5, shape="llama"):
    """Train; return loss and gradient norm of each step, and the sums by task of the last."""
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, extra, world_size, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        curve = []
        for plan in plans_of(split, data_seed(split), steps):
            report = trainer.train_step(split, plan, np.asarray(weights))
            curve.append((report.loss, report.grad_norm))
        return curve, {name: getattr(report, name).tolist() for name in ("loss_K", "tokens_K", "share_K")}


def train_in_modes(prefix, layout, world_size, modes, steps, shape="llama"):
    """Train some steps in one mode after another, in one set of process groups.

    Args:
        modes: options by mode.
        steps: number of steps by mode.

    Returns:
        by mode a list with a dict for each step: loss, gradient norm and sums by task; for the first and the last step
        also gradients (:func:`chosen_gradients`), for the last also weights (:func:`chosen_weights`).
    """
    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.task_weights import initial_weights

    arguments = arguments_for(prefix, layout, world_size, shape)
    dataset = open_dataset(arguments)
    split, size, curves = dataset.split("train"), arguments.training.global_batch_size, {}
    seed = data_seed(split)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        for mode, extra in modes.items():
            arguments = arguments_for(prefix, f"{layout} {FOR_GRADIENTS} {extra}", world_size, shape)
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            weight_K = initial_weights(arguments.multi_task, dataset.tasks)
            curves[mode] = []
            for step in range(steps[mode]):
                plan = plan_step(split, seed=seed, global_batch_size=size, consumed_samples=size * step)
                record = _record(trainer, trainer.train_step(split, plan, weight_K))
                if step in (0, steps[mode] - 1):
                    record["gradients"] = chosen_gradients(trainer)
                curves[mode].append(record)
            curves[mode][-1]["weights"] = chosen_weights(trainer)
    return curves


def train_on_everything(prefix, layout, world_size, modes, shape="llama"):
    """Train a step in each mode on all rows of the training split; return loss, gradient norm, sums and gradients."""
    from mft_megatron.data.loading.step_plan import plan_evaluation
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, layout, world_size, shape)
    split, records = open_dataset(arguments).split("train"), {}
    (plan,) = plan_evaluation(split, -(-split.num_packs // 8) * 8)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        for mode, extra in modes.items():
            arguments = arguments_for(prefix, f"{layout} {FOR_GRADIENTS} {extra}", world_size, shape)
            trainer = Trainer(arguments, split.dataset.vocab_size, 4)
            records[mode] = _record(trainer, trainer.train_step(split, plan, TASK_WEIGHTS))
            records[mode]["gradients"] = chosen_gradients(trainer)
    return records


def _record(trainer, report):
    record = {"loss": report.loss, "grad_norm": report.grad_norm}
    return record | {name: getattr(report, name).numpy() for name in BY_TASK}


def chosen(trainer):
    """Choose a matrix and a norm of each layer and both vocabulary matrices, of those that this rank has.

    Returns:
        by name the axis that tensor parallelism splits (``None``: not split), the index of this rank's shard, and the
        parameter.
    """
    from megatron.core import parallel_state

    weights = {}
    part, expert_part = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    for chunk in trainer.chunks:
        model = chunk.module
        if model.pre_process:
            weights["embedding"] = 0, part, model.embedding.word_embeddings.weight
        for layer in model.decoder.layers:
            name = f"layer {layer.layer_number}"
            weights[f"{name} linear_qkv"] = 0, part, layer.self_attention.linear_qkv.weight
            weights[f"{name} input_layernorm"] = None, 0, layer.input_layernorm.weight
            if not hasattr(layer.mlp, "experts"):
                weights[f"{name} linear_fc2"] = 1, part, layer.mlp.linear_fc2.weight
                continue
            weights[f"{name} router"] = None, 0, layer.mlp.router.weight
            experts = layer.mlp.experts.local_experts
            first = parallel_state.get_expert_model_parallel_rank() * len(experts)
            for index, expert in enumerate(experts, first):
                weights[f"{name} expert {index}"] = 1, expert_part, expert.linear_fc2.weight
        if model.post_process and not model.share_embeddings_and_output_weights:
            weights["output_layer"] = 0, part, model.output_layer.weight
    return weights


def chosen_gradients(trainer):
    """Copy the gradients of :func:`chosen`; empty with the distributed optimizer, where ranks have shards of them."""
    if trainer.arguments.distributed.use_distributed_optimizer:
        return {}
    return {
        name: (axis, part, weight.main_grad.numpy().copy()) for name, (axis, part, weight) in chosen(trainer).items()
    }


def chosen_weights(trainer):
    """Copy the weights of :func:`chosen`."""
    with trainer.weights.whole():
        return {
            name: (axis, part, weight.detach().numpy().copy()) for name, (axis, part, weight) in chosen(trainer).items()
        }


def whole(of_ranks):
    """Concatenate the shards of all ranks by name; shards that several ranks have must be equal, bit for bit."""
    axes, shards = {}, {}
    for tensors in of_ranks:
        for name, (axis, part, shard) in tensors.items():
            axes[name] = axis
            known = shards.setdefault(name, {}).setdefault(part, shard)
            assert np.array_equal(known, shard), f"{name}: ranks differ"
    return {
        name: of_part[0]
        if axes[name] is None
        else np.concatenate([of_part[part] for part in sorted(of_part)], axes[name])
        for name, of_part in shards.items()
    }


def info_of_step(step):
    """The description of a checkpoint that this rank's run saves after a step."""
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.run_folder.description import CheckpointInfo

    return CheckpointInfo(step, 0, {}, 500, {}, "", 1, 8, layout=process_groups.parallel_layout())


def some_steps(prefix, extra, world_size, folder, save_after, steps, seed=1234):
    """Train some steps; return losses, gradient norms and learning rates.

    Args:
        save_after: step after which to save; ``None`` to resume from the newest checkpoint in ``folder``.
    """
    import dataclasses
    from pathlib import Path

    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo
    from mft_megatron.run_folder.found import latest_checkpoint

    arguments = arguments_for(prefix, f"{extra} --seed {seed}", world_size)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        start, curve = 0, []
        if save_after is None:
            newest = latest_checkpoint(folder)
            path, info = newest.path, newest.info
            checkpoint.load(path, trainer, info, arguments.checkpoint)
            start = info.iteration
        for step in range(start, steps):
            plan = plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * step)
            report = trainer.train_step(split, plan, np.ones(4))
            curve.append((report.loss, report.grad_norm, report.learning_rate))
            if step + 1 == save_after:
                network = dataclasses.asdict(arguments.network)
                info = CheckpointInfo(
                    step + 1, 0, network, dataset.vocab_size, {}, "", 1, 8, layout=process_groups.parallel_layout()
                )
                checkpoint.save(Path(folder), trainer, info, arguments.checkpoint)
        return curve


def train_save_load(prefix, folder):
    """Train two steps, save, train a third, and repeat it from the checkpoint; return both losses of the third."""
    from pathlib import Path

    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo

    arguments = arguments_for(prefix, "--hidden-dropout 0.1 --attention-dropout 0.1", 1)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):

        def step(trainer, index):
            plan = plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * index)
            return trainer.train_step(split, plan, np.ones(4)).loss

        trainer = Trainer(arguments, dataset.vocab_size, 4)
        step(trainer, 0), step(trainer, 1)
        info = CheckpointInfo(2, 16, {}, 1, {}, "", 1, 8, layout=process_groups.parallel_layout())
        path = checkpoint.save(Path(folder), trainer, info, arguments.checkpoint)
        third = step(trainer, 2)
        again = Trainer(arguments, dataset.vocab_size, 4)
        checkpoint.load(path, again, info, arguments.checkpoint)
        return third, step(again, 2)
