"""Import of checkpoints of Megatron-LM and Megatron-Bridge."""
