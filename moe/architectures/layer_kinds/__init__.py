"""Layers whose experts or gradients differ: a dense gradient for the router, experts in a narrow space or gating themselves."""
