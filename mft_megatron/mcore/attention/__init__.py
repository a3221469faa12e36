"""Attention of packed rows, and the kernels that compute it."""
