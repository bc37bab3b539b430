"""Decoder layers of single tokens in C: what surrounds experts, the router's choice, and the chosen experts."""
