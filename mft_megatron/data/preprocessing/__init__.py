"""What the data commands do: encode records, cache, store, pack again."""
