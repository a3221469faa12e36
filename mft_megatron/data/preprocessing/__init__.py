"""The work of the data commands: encode records, cache them, store samples, pack them, pack them again."""
