"""What the JAX twin is built from: dense layers, grouped products, sorting, meshes."""
