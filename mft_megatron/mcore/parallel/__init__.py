"""Ranks and what they share: process groups, shards of weights, of tokens and of segments."""
