"""A GPT model made of Megatron-Core's layers."""
