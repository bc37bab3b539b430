"""The JAX twin's routers, losses and capacity limits."""
