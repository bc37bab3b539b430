"""Answers many requests with one model: sequences, their caches and samplers, the schedule, kept prefixes."""
