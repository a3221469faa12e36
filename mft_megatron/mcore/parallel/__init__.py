"""Process groups, data parallelism, and shards of weights, tokens and segments."""
