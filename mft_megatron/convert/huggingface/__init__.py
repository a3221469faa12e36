"""Hugging Face models, both ways: folders, configurations, families, weights."""
