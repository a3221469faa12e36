"""Checkpoints with random adapters, and what they mean for a Hugging Face model: laid out row by row, by hand."""

import dataclasses
import types
from pathlib import Path

from tests.convert import tiny_models

RANK = 3


def info_of(hf):
    from mft_megatron.convert.huggingface.weight_source import HuggingFaceSource

    return HuggingFaceSource(str(hf)).info


def lora_for(info, names, rank=RANK, alpha=5.0, rslora=False):
    from mft_megatron.arguments.groups.network import NetworkArguments
    from mft_megatron.lora import Lora, read_targets

    gated = NetworkArguments(**info.architecture).gated
    return Lora(rank, alpha, read_targets(names, gated), 0.05, rslora)


def rows_of(module, architecture):
    """By row of a matrix of Megatron's: our source, and the row in that source's own matrix."""
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
    a = architecture
    attention = a.num_attention_heads * a.kv_channels
    return {"linear_proj": attention, "linear_fc2": a.ffn_hidden_size}.get(module, a.hidden_size)


def random_adapters(info, lora, dtype="float32", seed=0, size=0.4):
    """By name: A and B of all layers, as a checkpoint has them; rows that no A serves are 0."""
    import torch

    from mft_megatron.arguments.groups.network import NetworkArguments

    architecture = NetworkArguments(**info.architecture)
    generator, found = torch.Generator().manual_seed(seed), {}
    for target in lora.targets:
        inside = "self_attention" if target.module in ("linear_qkv", "linear_proj") else "mlp"
        rows, columns = rows_of(target.module, architecture), columns_of(target.module, architecture)
        served = {source for part in target.parts for source in part}
        a = torch.randn(architecture.num_layers, len(target.parts) * lora.rank, columns, generator=generator)
        b = torch.randn(architecture.num_layers, len(rows), lora.rank, generator=generator)
        b *= torch.tensor([source in served for source, _ in rows])[:, None]
        for letter, content in (("a", a), ("b", b)):
            content = (size * content).to(getattr(torch, dtype))
            found[f"decoder.layers.{inside}.{target.module}.lora_{letter}"] = content
    return found


def write_run(run, info, weights, iteration=7, **changes):
    """A run folder with one checkpoint of these weights, whole or in pieces; returns the checkpoint's description."""
    from mft_megatron.mcore.checkpointing.tensor_writer import Weight, write_weights
    from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
    from mft_megatron.run_folder import TRACKER, iteration_folder, write_info

    run = Path(run)
    path = iteration_folder(run, iteration)
    path.mkdir(parents=True)
    planned = {name: Weight(name, tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    slices = [WeightSlice(name, (), (0,) * len(weight.shape), weight.shape) for name, weight in planned.items()]
    source = types.SimpleNamespace(read=lambda wanted: weights[wanted.name])
    write_weights(path, planned, slices, source, 2**20)
    info = dataclasses.replace(info, iteration=iteration, consumed_samples=28, **changes)
    write_info(path, info)
    (run / TRACKER).write_text(f"{iteration}\n")
    return info


def write_adapters(run, info, lora, weights, iteration=7, **changes):
    """A run folder with a checkpoint of adapters alone."""
    return write_run(run, info, weights, iteration, lora=lora.as_dict(), has_base=False, **changes)


def their_deltas(info, lora, weights):
    """By name of a Hugging Face weight: what the adapters add to it, in fp64."""
    import torch

    from mft_megatron.arguments.groups.network import NetworkArguments

    architecture = NetworkArguments(**info.architecture)
    found = {}
    for target in lora.targets:
        inside = "self_attention" if target.module in ("linear_qkv", "linear_proj") else "mlp"
        rows = rows_of(target.module, architecture)
        part_of = {source: number for number, part in enumerate(target.parts) for source in part}
        for layer in range(architecture.num_layers):
            a, b = (weights[f"decoder.layers.{inside}.{target.module}.lora_{x}"][layer].double() for x in "ab")
            names = _names(target.module, info.source, layer, architecture)
            for source in part_of:
                first = part_of[source] * lora.rank
                product = lora.scale * (b @ a[first : first + lora.rank])
                ours = [row for row, (owner, _) in enumerate(rows) if owner == source]
                fused = len(set(names)) < len(names)
                # GPT-NeoX has queries, keys and values of a head together, in Megatron's order
                theirs = ours if fused else [rows[row][1] for row in ours]
                empty = torch.zeros(len(rows) if fused else len(ours), a.shape[1], dtype=torch.float64)
                delta = found.setdefault(names[source], empty)
                delta[theirs] += product[ours]
    return found


def _names(module, source, layer, architecture):
    """By our source: the weight that it is in."""
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
    import torch
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # others know no fp64
    return AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, dtype), **eager).eval()


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(tiny_models.some_tokens()).logits[0].double()


def add(model, deltas):
    """The model's weights with what adapters add, in its own dtype."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name] += delta
    return model
