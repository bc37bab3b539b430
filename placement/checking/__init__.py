"""Derives what a plan claims again, by code that shares nothing with solvers, objectives and bounds."""
