"""Between Megatron-Core distributed checkpoints and Hugging Face folders.

::

    TensorReader (one layer at a time) ─► family table: names and row kinds ─► safetensors shards + config + tokenizer
"""
