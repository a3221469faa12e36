"""This machine: devices, optional packages, number formats, and all patches of Megatron-Core and torch."""
