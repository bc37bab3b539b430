"""Commands about low-bit experts: the options and steps of `pack` that quantise, and `quality`."""
