"""What the ranks of a layout test do: a short run through the trainer's own parts."""

SHAPE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--make-vocab-size-divisible-by 128 --init-method-std 0.02 --seq-length 128 --train-iters 5 --lr 1e-3 "
    "--global-batch-size 8"
)


def arguments_for(prefix, extra, world_size):
    from mft_megatron.arguments import parse_arguments

    words = f"{SHAPE} --data-path {prefix} {extra}".split()
    if "--micro-batch-size" not in words:
        words += ["--micro-batch-size", "2"]
    return parse_arguments(words, world_size)


def open_dataset(arguments):
    from mft_megatron.data.dataset import PackedDataset

    return PackedDataset.open(arguments.data.data_path, arguments.data.seq_length)


def train(prefix, extra, world_size, weights=(1.0, 2.0, 0.5, 3.0), steps=5):
    """Loss and gradient norm of each step, and the per-task sums of the last."""
    import numpy as np

    from mft_megatron.data.step_plan import plan_step
    from mft_megatron.mcore import parallel
    from mft_megatron.mcore.step import Trainer

    arguments = arguments_for(prefix, extra, world_size)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with parallel.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, np.array(weights))
        curve = []
        for step in range(steps):
            plan = plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * step)
            report = trainer.train_step(split, plan)
            curve.append((report.loss, report.grad_norm))
        return curve, {name: getattr(report, name).tolist() for name in ("loss_K", "tokens_K", "share_K")}


def train_save_load(prefix, folder):
    """Two steps, a save, a third step; then the third step again from the save. Returns both third steps."""
    from pathlib import Path

    import numpy as np

    from mft_megatron.data.step_plan import plan_step
    from mft_megatron.mcore import checkpoint, parallel
    from mft_megatron.mcore.step import Trainer
    from mft_megatron.run_folder import CheckpointInfo

    arguments = arguments_for(prefix, "--hidden-dropout 0.1 --attention-dropout 0.1", 1)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with parallel.process_groups(arguments.distributed, arguments.initialization.seed):

        def step(trainer, number):
            plan = plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * number)
            return trainer.train_step(split, plan).loss

        trainer = Trainer(arguments, dataset.vocab_size, np.ones(4))
        step(trainer, 0), step(trainer, 1)
        info = CheckpointInfo(2, 16, {}, 1, {}, "", 1, 8, layout=parallel.layout())
        path = checkpoint.save(Path(folder), trainer, info, arguments.checkpoint)
        third = step(trainer, 2)
        again = Trainer(arguments, dataset.vocab_size, np.ones(4))
        checkpoint.load(path, again, info, arguments.checkpoint)
        return third, step(again, 2)
