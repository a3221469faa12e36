"""Stored samples to packs of one sequence length: cut, split, sample, pack."""
