"""Decoder layers computed for one token by two calls of C, where those give the bits of the modules."""
