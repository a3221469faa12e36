"""This machine: devices, known releases, optional packages, number formats, all patches of Megatron-Core and torch."""
