"""This machine: its devices, optional packages, and every replacement inside Megatron-Core and torch."""
