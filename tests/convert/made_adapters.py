"""Checkpoints with random adapters, and the change that these make to a Hugging Face model, computed row by row."""

import dataclasses
import types
from pathlib import Path

from tests.convert import tiny_models

RANK = 3


def info_of(hf):
    """Describe the model of a Hugging Face folder."""
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource

    return HuggingFaceSource(str(hf)).info


def lora_for(info, names, rank=RANK, alpha=5.0, rslora=False):
    """Describe adapters on the targets called ``names`` of a model."""
    from mft_megatron.arguments.groups.network import NetworkArguments
    from mft_megatron.lora import Lora, read_targets

    gated = NetworkArguments(**info.architecture).gated
    return Lora(rank, alpha, read_targets(names, gated), 0.05, rslora)


def rows_of(module, architecture):
    """For each row of one of Megatron's matrices its source and the row in the source's own matrix."""
    a = architecture
    if module == "linear_fc1":
        return [(source, row) for source in range(2 if a.gated else 1) for row in range(a.ffn_hidden_size)]
    if module != "linear_qkv":
        return [(0, row) for row in range(a.hidden_size)]
    rows, heads = [], a.num_attention_heads // a.num_query_groups
    for group in range(a.num_query_groups):
        for head in range(group * heads, (group + 1) * heads):
            rows += [(0, head * a.kv_channels + d) for d in range(a.kv_channels)]
        rows += [(source, group * a.kv_channels + d) for source in (1, 2) for d in range(a.kv_channels)]
    return rows


def columns_of(module, architecture):
    """Columns of one of Megatron's matrices."""
    a = architecture
    attention = a.num_attention_heads * a.kv_channels
    return {"linear_proj": attention, "linear_fc2": a.ffn_hidden_size}.get(module, a.hidden_size)


def prefix_of(module):
    """Name of one of Megatron's matrices in a checkpoint, without ``.weight``."""
    inside = "self_attention" if module in ("linear_qkv", "linear_proj") else "mlp"
    return f"decoder.layers.{inside}.{module}"


def random_adapters(info, lora, dtype="float32", seed=0, size=0.4):
    """Random A's and B's of all layers, by name in a checkpoint; rows of B without an A are 0."""
    import torch

    from mft_megatron.arguments.groups.network import NetworkArguments

    architecture = NetworkArguments(**info.architecture)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for target in lora.targets:
        rows, columns = rows_of(target.module, architecture), columns_of(target.module, architecture)
        adapted = {source for part in target.parts for source in part}
        a = torch.randn(architecture.num_layers, len(target.parts) * lora.rank, columns, generator=generator)
        b = torch.randn(architecture.num_layers, len(rows), lora.rank, generator=generator)
        b *= torch.tensor([source in adapted for source, _ in rows])[:, None]
        for letter, content in (("a", a), ("b", b)):
            weights[f"{prefix_of(target.module)}.lora_{letter}"] = (size * content).to(getattr(torch, dtype))
    return weights


def write_run(run, info, weights, iteration=7, **changes):
    """Write a run folder with a checkpoint of these weights; its description is ``info`` with ``changes``."""
    from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
    from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
    from mft_megatron.run_folder.description import write_info
    from mft_megatron.run_folder.names import TRACKER, iteration_folder

    run = Path(run)
    path = iteration_folder(run, iteration)
    path.mkdir(parents=True)
    planned = {name: Weight(name, tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    slices = [WeightSlice(name, (), (0,) * len(weight.shape), weight.shape) for name, weight in planned.items()]
    source = types.SimpleNamespace(read=lambda wanted: weights[wanted.name])
    write_weights(path, planned, slices, source, 2**20)
    write_info(path, dataclasses.replace(info, iteration=iteration, consumed_samples=28, **changes))
    (run / TRACKER).write_text(f"{iteration}\n")


def write_adapters(run, info, lora, weights, iteration=7, **changes):
    """Write a run folder with a checkpoint of adapters alone."""
    write_run(run, info, weights, iteration, lora=lora.as_dict(), has_base=False, **changes)


def write_random_adapters(run, info, names, dtype="float32", seed=0, iteration=7, base="", **options):
    """Write a run folder with a checkpoint of random adapters alone.

    Args:
        run: the run folder.
        info: description of the model.
        names: targets.
        base: folder of the model in the checkpoint's description.
        options: those of :func:`lora_for`.

    Returns:
        description and weights of the adapters.
    """
    lora = lora_for(info, names, **options)
    weights = random_adapters(info, lora, dtype, seed)
    write_adapters(run, info, lora, weights, iteration, base=base)
    return lora, weights


def deltas_of(info, lora, weights):
    """Change of each Hugging Face weight by its adapters, by name, fp64."""
    import torch

    from mft_megatron.arguments.groups.network import NetworkArguments

    architecture = NetworkArguments(**info.architecture)
    deltas = {}
    for target in lora.targets:
        rows = rows_of(target.module, architecture)
        part_of = {source: index for index, part in enumerate(target.parts) for source in part}
        for layer in range(architecture.num_layers):
            a, b = (weights[f"{prefix_of(target.module)}.lora_{letter}"][layer].double() for letter in "ab")
            names = _hf_names(target.module, info.source, layer, architecture)
            for source in part_of:
                first = part_of[source] * lora.rank
                product = lora.scale * (b @ a[first : first + lora.rank])
                rows_here = [row for row, (of_row, _) in enumerate(rows) if of_row == source]
                fused = len(set(names)) < len(names)
                # GPT-NeoX stores query, key and value of a head in Megatron's order
                rows_there = rows_here if fused else [rows[row][1] for row in rows_here]
                empty = torch.zeros(len(rows) if fused else len(rows_here), a.shape[1], dtype=torch.float64)
                delta = deltas.setdefault(names[source], empty)
                delta[rows_there] += product[rows_here]
    return deltas


def _hf_names(module, source, layer, architecture):
    """Name of the Hugging Face weight of each source."""
    if source == "GPTNeoXForCausalLM":
        names = {
            "linear_qkv": "attention.query_key_value",
            "linear_proj": "attention.dense",
            "linear_fc1": "mlp.dense_h_to_4h",
            "linear_fc2": "mlp.dense_4h_to_h",
        }
        name = f"gpt_neox.layers.{layer}.{names[module]}.weight"
        return [name] * (3 if module == "linear_qkv" else 1)
    names = {
        "linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "linear_proj": ["self_attn.o_proj"],
        "linear_fc1": ["mlp.gate_proj", "mlp.up_proj"] if architecture.gated else ["mlp.c_fc"],
        "linear_fc2": ["mlp.down_proj"] if architecture.gated else ["mlp.c_proj"],
    }
    return [f"model.layers.{layer}.{name}.weight" for name in names[module]]


def load(hf, dtype="float64"):
    """Load a Hugging Face folder with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # others do not support fp64
    return AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, dtype), **eager).eval()


def load_with_adapter(hf, adapter):
    """Load a Hugging Face folder and a PEFT folder, in fp32."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(hf, "float32"), adapter).eval()


def logits_of(model):
    """Logits of a model of transformers for fixed tokens, fp64 [S, V]."""
    import torch

    with torch.no_grad():
        return model(tiny_models.some_tokens()).logits[0].double()


def add_deltas(model, deltas):
    """Add deltas to the weights of a model of transformers, in its dtype; returns the model."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name] += delta
    return model
