"""The arithmetic that routers share, with its C: top-k, normalised scores, the GRU step, rows of large tables."""
