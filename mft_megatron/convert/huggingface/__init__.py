"""Hugging Face models, read and written: folders, configurations, families, weights."""
