"""A GPU that is not there: what torch and Megatron-Core ask of CUDA, answered on tensors without content."""
