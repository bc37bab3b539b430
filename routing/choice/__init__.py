"""The arithmetic that routers share, with its C: top-k, the GRU step, rows of large tables."""
