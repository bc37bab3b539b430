"""Scores a plan, and checks that score by other code."""
