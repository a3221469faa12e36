"""The engine room: the only place that imports Megatron-Core or asks for CUDA (docs/ARCHITECTURE.md).

::

    platform ─► parallel ─► attention, moe, output_layer, adapters ─► model ─► optim ─► trainer ─► checkpointing
"""
