"""Architectures that change attention, or how often a token passes the layers at once: heads, streams, late sums."""
