"""Architectures that change attention, or how often a token passes the layers at once: routed heads, parallel streams."""
