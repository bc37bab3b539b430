"""`load`, the division of memory, what transformers calls at each layer, the report."""
