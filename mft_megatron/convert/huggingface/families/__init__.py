"""Model families: one declarative table a file; ``table`` lists them by ``model_type``."""
