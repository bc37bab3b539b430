"""Smaller models inside a dense one: layers and hidden units chosen by prompt or by shape, cut out as plain models."""
