"""Layers beside plain ones of as many operations: memory layers, latent experts."""
