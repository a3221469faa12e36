"""Tiny random models of every family, written by transformers, and the difference of Megatron-Core's logits."""

import json
import shutil
from pathlib import Path

TOKENS = 48
SHAPE = {
    "vocab_size": 131,  # padded for every tensor-parallel size
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# entries of published models that transformers does not read, here with values that would change what is computed
UNREAD = {"rope_interleaved": True, "activation": "relu", "embedding_multiplier": 3.0}
# class in transformers and differences from SHAPE, by name; scalings and windows are small enough to matter in TOKENS
MODELS = {
    "llama": ("Llama", {"head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama3 tied": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "deepseek-coder": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
            "num_key_value_heads": 4,
            **UNREAD,
        },
    ),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with biases in attention": ("Llama", {"attention_bias": True}),
    "llama with biases in the MLP": ("Llama", {"mlp_bias": True}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "use_mrope": True}),
    "qwen2 windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_key_value_heads": 4},
    ),
    "qwen2 yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
            }
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 8}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-3}),
    "gemma in groups": ("Gemma", {"head_dim": 16, "hidden_activation": None, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 13, "num_hidden_layers": 2}),
    "gpt-neox": ("GPTNeoX", {"attention_bias": False, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
    "gpt-neox in turn tied": (
        "GPTNeoX",
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    ),
    # the base of StarCoder2-3B is not a whole number
    "starcoder2": (
        "Starcoder2",
        {"sliding_window": 11, "rope_parameters": {"rope_type": "default", "rope_theta": 99.4420358813}},
    ),
    "starcoder2 without biases": ("Starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
}


def write_model(name: str, folder: Path, dtype: str = "float32", tokenizer: Path | None = None, **sizes: int) -> None:
    """Write a model in which every weight matters: no norm is 1, no bias 0, and attention is far from uniform.

    Args:
        name: key of ``MODELS``.
        folder: folder to write; :func:`logits_file` of it gets the model's logits.
        dtype: dtype of the stored weights; logits are of fp32.
        tokenizer: folder whose files are copied; ``None``: files that only have the names of a tokenizer's.
        sizes: entries that replace those of ``SHAPE``.
    """
    import torch
    import transformers

    kind, changes = MODELS[name]
    without = ("num_key_value_heads",) if kind == "GPTNeoX" else ()
    shape = {key: n for key, n in {**SHAPE, **sizes}.items() if key not in without}
    config = getattr(transformers, f"{kind}Config")(**{**shape, "rope_parameters": dict(PLAIN), **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in key and key.endswith("weight")
            weight.copy_(0.3 * noise + (kind != "Gemma") if is_norm else 0.2 * noise)  # Gemma's are stored less 1
        torch.save(model.eval()(some_tokens()).logits[0], logits_file(folder))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "of": "nothing"}\n')
    (folder / "tokenizer_config.json").write_text("{}")
    for file in tokenizer.iterdir() if tokenizer is not None else ():
        shutil.copyfile(file, folder / file.name)
    (folder / "LICENSE").write_text("as it is\n")
    # as published models have it: key order and spaces that json.dumps would not make, and an irrelevant entry
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({"use_cache": True, **config, "torch_dtype": dtype}, indent=1)
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2,   3]}')


def logits_file(folder: Path | str) -> Path:
    """File with transformers' logits of :func:`some_tokens`: fp32 [TOKENS, vocabulary]."""
    return Path(f"{folder}_logits.pt")


def some_tokens():
    """Fixed random token ids, int64 [1, TOKENS]."""
    import torch

    return torch.randint(131, (1, TOKENS), generator=torch.Generator().manual_seed(5))


def argv_for(extra):
    """Build the arguments of a run without data, for a model that ``extra`` names."""
    command_line = (
        f"--data-path none --seq-length {TOKENS} --micro-batch-size 1 --train-iters 1 --lr 1e-3 "
        f"--make-vocab-size-divisible-by 8 --attention-dropout 0 --hidden-dropout 0 {extra}"
    )
    return command_line.split()


def arguments_for(checkpoint, world_size, extra=""):
    """Parse the arguments of a run that loads a checkpoint."""
    from mft_megatron.arguments.command import parse_arguments

    return parse_arguments(argv_for(f"--load {checkpoint} {extra}"), world_size)


def logit_differences(layout, world_size, models):
    """Compare Megatron-Core's logits of :func:`some_tokens` with those of transformers, in fp32.

    Args:
        layout: options of the parallel layout.
        world_size: number of ranks.
        models: checkpoint and Hugging Face folder, by name.

    Returns:
        largest absolute difference and standard deviation of the logits, by name; empty before the last stage.
    """
    from pathlib import Path

    import torch
    from megatron.core import parallel_state, tensor_parallel

    from mft_megatron.mcore.checkpointing import checkpoint as checkpoints
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.device_batch import to_device
    from mft_megatron.mcore.trainer import Trainer
    from tests.batches import one_segment

    differences = {}
    first = arguments_for(next(iter(models.values()))[0], world_size, layout)
    with process_groups.process_groups(first.distributed, seed=99):
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        for name, (folder, hf) in models.items():
            arguments = arguments_for(folder, world_size, layout)
            path, info = arguments.resume.path, arguments.resume.info
            trainer = Trainer(arguments, info.vocab_size, 1)
            checkpoints.load(Path(path), trainer, info, arguments.checkpoint)
            model = trainer.chunks[0].eval().module
            batch = to_device(one_segment(some_tokens().numpy()))
            shards = arguments.distributed.tensor_model_parallel_size if arguments.distributed.sequence_parallel else 1
            hidden = torch.empty(TOKENS // shards, 1, arguments.network.hidden_size)
            with torch.no_grad():
                if stage > 0:
                    torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
                    model.set_input_tensor(hidden)
                output = model.run(batch, with_loss=False)
                if stage + 1 < stages:
                    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
                    continue
                logits = tensor_parallel.gather_from_tensor_model_parallel_region(output)[0, :, : info.vocab_size]
            expected = torch.load(logits_file(hf))
            differences[name] = float((logits - expected).abs().max()), float(expected.std())
    return differences


def save_weights(weights, file):
    """Write a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, file, metadata={"format": "pt"})
