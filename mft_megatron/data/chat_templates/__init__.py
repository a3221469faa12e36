"""Turns of a conversation to text in which the supervised spans are known."""
