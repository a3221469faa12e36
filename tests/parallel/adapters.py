"""Functions that ranks run in tests of adapters: fill every matrix with known values, train some steps, compare."""

from tests.parallel.run import FOR_GRADIENTS, TASK_WEIGHTS, arguments_for, data_seed, open_dataset, plans_of


class KnownAdapters:
    """A source of adapters that are the same whatever the parallel layout, fp32.

    B is not 0, so that A has a gradient from the first step.
    """

    def read(self, wanted):
        """Read a slice of A or B."""
        import hashlib

        import torch

        seed = int.from_bytes(hashlib.sha256(f"{wanted.name}{wanted.index}".encode()).digest()[:4], "little")
        whole = torch.randn(1024, 512, generator=torch.Generator().manual_seed(seed)) * 0.05
        return whole[wanted.region]


def trainer_of(arguments, dataset):
    """Build a trainer with known adapters; the base is initialised from the seed."""
    from mft_megatron.mcore.checkpointing.load_weights import fill_weights
    from mft_megatron.mcore.trainer import Trainer

    trainer = Trainer(arguments, dataset.vocab_size, 4)
    fill_weights(trainer, KnownAdapters(), adapters=True)
    return trainer


def train_adapters(prefix, options, world_size, shape="llama", steps=3):
    """Train adapters.

    Returns:
        loss and gradient norm of each step; the adapters' gradients of the first step, empty with the distributed
        optimizer; and the adapters after the last step. Both as :func:`adapter_shards` gives them.
    """
    from mft_megatron.mcore.parallel import process_groups

    arguments = arguments_for(prefix, f"{FOR_GRADIENTS} --peft-type lora {options}", world_size, shape)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = trainer_of(arguments, dataset)
        curve, gradients = [], {}
        for plan in plans_of(split, data_seed(split), steps):
            report = trainer.train_step(split, plan, TASK_WEIGHTS)
            curve.append((report.loss, report.grad_norm))
            if not gradients and not arguments.distributed.use_distributed_optimizer:
                gradients = adapter_shards(trainer, lambda parameter: parameter.main_grad)
        with trainer.weights.whole():
            return curve, gradients, adapter_shards(trainer, lambda parameter: parameter.detach())


def adapter_shards(trainer, tensor_of):
    """Copy a tensor of each adapter's matrix, such as its gradient.

    Returns:
        by name and layer a list of this rank's shards: first row and column, and the content.
    """
    from mft_megatron.lora import is_adapter
    from mft_megatron.mcore.parallel.sharded_weights import shards_of

    shards = {}
    for chunk in trainer.chunks:
        by_address = {parameter.data_ptr(): parameter for parameter in chunk.parameters()}
        for shard in shards_of(chunk.module):
            if is_adapter(shard.key):
                stacked = shard.prepend_axis_num
                parameter, start = _owner(by_address, shard.data)
                rows = tensor_of(parameter)[start : start + shard.data.shape[0]]
                name = (shard.key, *shard.global_offset[:stacked])
                shards.setdefault(name, []).append((shard.global_offset[stacked:], rows.numpy().copy()))
    return shards


def _owner(by_address, view):
    """Find the parameter that ``view`` is a view of, and the row at which it begins."""
    for address, parameter in by_address.items():
        offset = view.data_ptr() - address
        if 0 <= offset < parameter.numel() * parameter.element_size():
            return parameter, offset // (parameter.element_size() * parameter.shape[1])
    raise AssertionError("no parameter")


def whole_adapters(of_ranks):
    """Assemble whole matrices from the shards of all ranks; shards that several have must be equal, bit for bit."""
    import numpy as np

    shards = {}
    for of_rank in of_ranks:
        for name, of_matrix in of_rank.items():
            for first, content in of_matrix:
                known = shards.setdefault(name, {}).setdefault(tuple(first), content)
                assert np.array_equal(known, content), f"{name}: ranks differ"
    matrices = {}
    for name, of_matrix in shards.items():
        rows = max(first[0] + content.shape[0] for first, content in of_matrix.items())
        columns = max(first[1] + content.shape[1] for first, content in of_matrix.items())
        matrices[name] = np.full((rows, columns), np.nan, dtype=np.float32)
        for first, content in of_matrix.items():
            matrices[name][first[0] : first[0] + content.shape[0], first[1] : first[1] + content.shape[1]] = content
    return matrices
