"""`expertier simulate`, `generate`, `fit`: run a model whose experts do not fit in fast memory."""
