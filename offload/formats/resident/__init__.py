"""Matrices that stay in memory in a stored form: what holds them, and which of a checkpoint's linear layers do."""
