"""Quantised checkpoints as if they were plain: codes and companions become one tensor, expanded when it is read."""
