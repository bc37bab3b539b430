"""Decisions of the engine that need no torch: who gets in, whose turn it is, which tokens may come next."""
