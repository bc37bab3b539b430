"""One training run, in torch or in JAX."""
