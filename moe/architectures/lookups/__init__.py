"""Feed-forward networks without a router whose weights are attended to or looked up: TokenFormer, MemoryFormer."""
