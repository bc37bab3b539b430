"""Routers that look at what a sequence has visited: a resident set with one swap per token, a pool per document."""
