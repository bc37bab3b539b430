"""Checkpoints of other families as models of ours, to train on from there; dense ones as mixtures of one expert."""
