"""Certificates: what training claims to compute, shown on the user's own data and model."""
