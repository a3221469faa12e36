"""One record: its conversation, then supervised segments of text."""
