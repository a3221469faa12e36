"""The options by group, a file each: Megatron's names, meanings and defaults."""
