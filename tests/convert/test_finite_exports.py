"""NaN and infinities in what is exported: no command writes them, and each names the weight and leaves no folder."""

import pytest
import torch
from safetensors.torch import load_file

from mft_megatron.convert.commands.huggingface import hf_to_mcore, mcore_to_hf
from mft_megatron.convert.commands.merge import merge_lora
from mft_megatron.convert.commands.peft import lora_to_peft
from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing import tensor_writer
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from tests.convert import made_adapters, tiny_models

NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A Hugging Face folder, its description, and its weights as a checkpoint names them."""
    root = tmp_path_factory.mktemp("finite")
    tiny_models.write_model("llama", root / "hf", "float16")
    hf_to_mcore(["--hf", str(root / "hf"), "--save", str(root / "start")])
    reader = TensorReader(root / "start" / "iter_0000000")
    return root / "hf", made_adapters.info_of(root / "hf"), {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (-float("inf"), "an infinity")])
def test_an_export_of_weights_that_are_not_finite_is_refused(stored, tmp_path, monkeypatch, value, kind):
    _, info, weights = stored
    weights = {**weights, NORM: weights[NORM].clone()}
    weights[NORM][3] = value
    monkeypatch.setattr(tensor_writer, "refuse_to_write", lambda *arguments: None)
    made_adapters.write_run(tmp_path / "run", info, weights, source="")
    with pytest.raises(InputError, match=f"^model.norm.weight would have {kind} in it, .* nothing is written"):
        mcore_to_hf(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "export")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_of_adapters_that_are_not_finite_is_refused(stored, tmp_path, monkeypatch):
    _, info, _ = stored
    lora = made_adapters.lora_for(info, ("o_proj",))
    weights = made_adapters.random_adapters(info, lora)
    weights["decoder.layers.self_attention.linear_proj.lora_b"][1, 2, 0] = float("nan")
    monkeypatch.setattr(tensor_writer, "refuse_to_write", lambda *arguments: None)
    made_adapters.write_adapters(tmp_path / "run", info, lora, weights)
    with pytest.raises(InputError, match=r"layers.1.self_attn.o_proj.lora_B.weight would have NaN in it"):
        lora_to_peft(["--load", str(tmp_path / "run"), "--hf", str(tmp_path / "export")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_sum_that_its_dtype_cannot_hold_is_refused(stored, tmp_path):
    """Adapters in fp32 whose product is finite, merged into a model in fp16."""
    hf, info, _ = stored
    lora = made_adapters.lora_for(info, ("o_proj",))
    weights = made_adapters.random_adapters(info, lora, size=300)
    made_adapters.write_adapters(tmp_path / "run", info, lora, weights)
    with pytest.raises(InputError, match=r"layers.0.self_attn.o_proj.weight would have an infinity .* wider dtype"):
        merge_lora(["--load", str(tmp_path / "run"), "--base", str(hf), "--hf", str(tmp_path / "export")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert load_file(hf / "model.safetensors")["model.norm.weight"].dtype == torch.float16
