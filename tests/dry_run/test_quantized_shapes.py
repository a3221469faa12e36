"""Matrices in 4 bits in a dry run: the tensors of real ones, and memory for nothing else."""

import json

from tests.dry_run.test_start import LLAMA
from tests.ranks import run_on_ranks

QLORA = (
    "--dry-run --seq-length 64 --bf16 --peft-type qlora --lora-rank 4 --tensor-model-parallel-size 2 --hf-checkpoint"
)


def kept(config):
    """Shapes and dtypes that each layer keeps of a real weight, and in a dry run, on this rank."""
    import torch

    from mft_megatron.arguments.command import read_command_line
    from mft_megatron.arguments.groups.dry_run import DRY_RUN
    from mft_megatron.dry_run.start import started
    from mft_megatron.mcore.adapters.quantized_linear import hold_shapes, quantized_layers
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    def held(layer):
        return {name: (tuple(value.shape), value.dtype) for name, value in vars(layer.quantized).items()}

    with (
        started(read_command_line([*QLORA.split(), str(config)], more=DRY_RUN)) as start,
        process_groups.process_groups(start.arguments.distributed, 1),
    ):
        model = Trainer(start.arguments, 32000, 1).chunks[0].module
        layers = quantized_layers(model)
        for name, layer in layers.items():
            layer.hold_weight(torch.randn(layer.weight.shape), name.rpartition(".")[2])
        real = {name: held(layer) for name, layer in layers.items()}
        hold_shapes(model)
        return real, {name: held(layer) for name, layer in layers.items()}


def test_what_is_kept_has_the_shapes_of_real_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 256, "intermediate_size": 384}))
    for real, simulated in run_on_ranks(2, kept, tmp_path):
        assert len(real) == 4 * LLAMA["num_hidden_layers"]
        assert simulated == real
