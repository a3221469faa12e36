"""Megatron-Core is patched before a test imports it itself."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)
