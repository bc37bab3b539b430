"""Placements in milliseconds: LPT, swaps, replication, EPLB."""
