"""Mixture-of-Recursions: one block applied a token-dependent number of times."""
