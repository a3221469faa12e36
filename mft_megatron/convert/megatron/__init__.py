"""Checkpoints of Megatron-LM and Megatron-Bridge, read into ours."""
