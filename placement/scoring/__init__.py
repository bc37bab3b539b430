"""Scores a plan on data."""
