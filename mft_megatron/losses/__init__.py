"""The objective as pure functions on tensors: no process groups, no Megatron, no data set (docs/LOSSES.md)."""
