"""Arguments of small models that Megatron-LM trains."""

import io
import pickle
from pathlib import Path

import torch

VOCABULARY, PADDED = 131, 256
SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "group_query_attention": False,
    "num_query_groups": 1,
    "max_position_embeddings": 64,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "swiglu": False,
    "squared_relu": False,
    "bias_gelu_fusion": False,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
    "moe_layer_freq": 1,
    "multi_latent_attention": False,
    "spec": None,
    "padded_vocab_size": PADDED,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 2,
    "params_dtype": torch.float32,
    "save": Path("/somewhere/else"),
}
MODERN = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
}
# by name: further arguments, and whether each layer is stored under a separate name
MODELS = {
    "llama": (
        {
            **MODERN,
            "group_query_attention": True,
            "num_query_groups": 2,
            "qk_layernorm": True,
            "use_rope_scaling": True,
            "rotary_base": 500000,
            "kv_channels": 16,
            "vocab_size": VOCABULARY,
        },
        False,
    ),
    "gpt": ({"squared_relu": True}, False),
    "layer by layer": ({**MODERN, "window_size": (5, 0), "add_qkv_bias": True}, True),
    "experts": (
        {
            **MODERN,
            "num_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 40,
            "moe_shared_expert_intermediate_size": 24,
            "moe_layer_freq": [0, 1, 1],
        },
        True,
    ),
}


def args_of(name, **changes):
    """All arguments of a model."""
    return {**SHAPE, **MODELS[name][0], **changes}


def move_to_object(path, content=None):
    """Store a checkpoint's common state as Megatron-Core does from 0.19: as an object of the checkpoint, not in a file.

    Args:
        path: folder of the checkpoint, which may hold nothing yet.
        content: the common state; ``None``: what is in ``common.pt``.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    path.mkdir(parents=True, exist_ok=True)
    index, file, name = path / ".metadata", path / "common.pt", "common_state/shard_0_1"
    if content is None:
        content = torch.load(file, weights_only=False)
    file.unlink(missing_ok=True)
    stream = io.BytesIO()
    torch.save([content], stream)
    before = b"other objects of the file"
    (path / "__common.distcp").write_bytes(before + stream.getvalue() + b"more objects")
    metadata = pickle.loads(index.read_bytes()) if index.is_file() else Metadata({}, storage_data={})
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__common.distcp", len(before), len(stream.getvalue()))
    index.write_bytes(pickle.dumps(metadata))
