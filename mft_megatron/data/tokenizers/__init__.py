"""Text to token ids: tokenizers and the backends that compute them."""
