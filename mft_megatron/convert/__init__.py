"""Conversion of Megatron-Core checkpoints to and from Hugging Face models, PEFT adapters and Megatron-LM's checkpoints.

::

    TensorReader (one weight at a time) ─► a family's table: names, row layouts ─► safetensors shards, config, tokenizer
"""
