"""Placement plans carried out on processes: what they move, counted, beside what was predicted."""
