"""Weights outside experts that do not fit: decoder layers, head and embedding, read in order of use."""
