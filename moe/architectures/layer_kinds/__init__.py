"""Layers that differ in experts or gradients: dense gradients, a narrow space, experts that choose themselves."""
