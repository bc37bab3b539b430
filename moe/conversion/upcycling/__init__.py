"""Sparse upcycling: a dense model written as a mixture of experts that computes the same."""
