"""Command lines of ``tools/convert_checkpoint.py`` and ``tools/quantize_hf.py``."""
