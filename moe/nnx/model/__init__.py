"""The JAX twin's layers and decoder, and how it reads our checkpoints."""
