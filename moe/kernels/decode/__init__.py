"""Kernels for few tokens: one program per routed row."""
