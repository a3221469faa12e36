"""LoRA adapters and 4-bit base weights."""
