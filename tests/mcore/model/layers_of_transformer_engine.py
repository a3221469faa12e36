"""Train with Transformer Engine's layers (a stand-in) and with local ones, and load each other's checkpoints.

A separate program, since Megatron-Core looks for Transformer Engine when it is imported:
``python layers_of_transformer_engine.py DATA FOLDER OPTIONS…``; prints its results as JSON.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
IMPLEMENTATIONS = ("local", "transformer_engine")


def main(prefix, folder, options):
    import numpy as np

    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.model import transformer_engine
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo
    from tests.parallel.run import arguments_for, open_dataset

    transformer_engine.require = lambda arguments: None
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel.layers import HAVE_TE as LAYERS_HAVE_TE

    assert HAVE_TE, "Megatron-Core imports more of Transformer Engine than the stand-in has"
    assert LAYERS_HAVE_TE, "Megatron-Core's own linear layers import more of Transformer Engine than the stand-in has"
    world_size = int(__import__("os").environ.get("WORLD_SIZE", 1))
    both = [arguments_for(prefix, f"{options} --transformer-impl {name}", world_size) for name in IMPLEMENTATIONS]
    dataset = open_dataset(both[0])
    split, results = dataset.split("train"), {}
    with process_groups.process_groups(both[0].distributed, both[0].initialization.seed):

        def step(trainer, number):
            plan = plan_step(split, seed=1, global_batch_size=8, consumed_samples=8 * number)
            report = trainer.train_step(split, plan, np.ones(4))
            return report.loss, report.grad_norm

        for name, arguments in zip(IMPLEMENTATIONS, both, strict=True):
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            layer = trainer.chunks[0].module.decoder.layers[0]
            results[name] = {"curve": [step(trainer, number) for number in range(2)]}
            results[name]["fused"] = trainer.chunks[0].config.gradient_accumulation_fusion
            results[name]["modules"] = [
                type(module).__name__ for module in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj)
            ]
            results[name]["core"] = type(layer.self_attention.core_attention).__name__
            entries = trainer.chunks[0].module.sharded_state_dict().values()
            results[name]["keys"] = sorted({entry.key for entry in entries})
            results[name]["parameters"] = trainer.num_parameters()
            info = CheckpointInfo(2, 16, {}, 1, {}, "", 1, 8, layout=process_groups.parallel_layout())
            (Path(folder) / name).mkdir(exist_ok=True)
            results[name]["path"] = str(checkpoint.save(Path(folder) / name, trainer, info, arguments.checkpoint))
            results[name]["third"] = step(trainer, 2)
        for name, arguments, other in zip(IMPLEMENTATIONS, both, reversed(IMPLEMENTATIONS), strict=True):
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            checkpoint.load(Path(results[other]["path"]), trainer, info, arguments.checkpoint)
            results[name]["third of the other's"] = step(trainer, 2)
        if process_groups.is_main():
            print("FOUND", json.dumps(results))


if __name__ == "__main__":
    from tests import fake_transformer_engine

    fake_transformer_engine.install()
    main(*sys.argv[1:3], " ".join(sys.argv[3:]))
