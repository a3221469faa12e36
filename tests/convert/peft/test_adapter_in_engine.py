"""A PEFT adapter in Megatron-Core: the logits are those of PEFT, also on several ranks."""

import pytest

from mft_megatron.convert.commands.peft import lora_to_peft
from tests.convert import made_adapters, tiny_models
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
# targets by model
CASES = {
    "llama with biases in attention": ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
    "qwen2 tied": ("k_proj", "v_proj", "up_proj", "gate_proj", "o_proj", "down_proj"),
    "gpt-neox": ("q_proj", "v_proj", "dense_4h_to_h"),
    "gemma": ("q_proj", "linear_fc1"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """For each model its folder, the folder of an adapter, and PEFT's logits."""
    cases = []
    for name, names in CASES.items():
        root = tmp_path_factory.mktemp("engine")
        tiny_models.write_model(name, root / "hf")
        info = made_adapters.info_of(root / "hf")
        made_adapters.write_random_adapters(root / "run", info, names)
        lora_to_peft(["--load", str(root / "run"), "--hf", str(root / "adapter")])
        model = made_adapters.load_with_adapter(root / "hf", root / "adapter")
        cases.append((str(root / "hf"), str(root / "adapter"), made_adapters.logits_of(model).numpy()))
    return cases


def _differences(layout, world_size, cases):
    """Largest difference of a logit for each model."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    from mft_megatron.arguments.command import parse_arguments
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource
    from mft_megatron.convert.peft.weight_source import AdapterSource
    from mft_megatron.mcore.checkpointing.load_weights import fill_weights
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.device_batch import to_device
    from mft_megatron.mcore.trainer import Trainer
    from tests.batches import one_segment

    def arguments_for(hf, adapter):
        words = f"--hf-checkpoint {hf} --hf-adapter {adapter} --peft-type lora {layout}"
        model = HuggingFaceSource(hf).info
        lora = AdapterSource(adapter, model).lora
        return parse_arguments(tiny_models.argv_for(words), world_size, None, model, lora)

    differences = []
    with process_groups.process_groups(arguments_for(*cases[0][:2]).distributed, seed=3):
        for hf, adapter, expected in cases:
            arguments = arguments_for(hf, adapter)
            source = HuggingFaceSource(hf)
            trainer = Trainer(arguments, source.info.vocab_size, 1)
            fill_weights(trainer, source)
            fill_weights(trainer, AdapterSource(adapter, source.info), adapters=True)
            model, batch = trainer.chunks[0].eval().module, to_device(one_segment(tiny_models.some_tokens().numpy()))
            with torch.no_grad():
                output = model.run(batch, with_loss=False)
                logits = tensor_parallel.gather_from_tensor_model_parallel_region(output)[
                    0, :, : source.info.vocab_size
                ]
            differences.append(float(np.abs(logits.numpy() - expected).max()))
    return differences


@pytest.mark.parametrize(("layout", "size"), [("", 1), ("--tensor-model-parallel-size 2 --sequence-parallel", 2)])
def test_logits_are_those_of_peft(adapters, layout, size):
    some = adapters if size == 1 else adapters[:3]  # Gemma has one key/value head
    # rounding alone: these adapters are large, and PEFT's logits in fp32 differ by 1e-4 from those in fp64; measured
    # are 5e-5 with torch 2.13 and 2.4e-4 with torch 2.6
    for differences in run_on_ranks(size, _differences, layout, size, some):
        assert max(differences) < 4e-4, differences
