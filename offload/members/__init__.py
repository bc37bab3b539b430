"""Whole models as experts: which member answers a prompt, and whose weights stay in one memory for all."""
