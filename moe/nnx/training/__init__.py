"""The JAX twin's training step, on one device or a mesh."""
