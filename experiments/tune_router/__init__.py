"""Trains the gates of a finished model and nothing else, so that its tokens reuse experts."""
