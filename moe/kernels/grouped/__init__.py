"""Kernels for many tokens, forward and backward, grouped by expert."""
