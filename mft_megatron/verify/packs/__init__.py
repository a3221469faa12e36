"""Certificate that samples that share a row do not see each other."""
