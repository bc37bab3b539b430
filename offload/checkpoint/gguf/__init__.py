"""GGUF files: what they say of a model, where its tensors are, and what the model calls them."""
