"""Experts over GPUs, host memories and SSDs of a cluster: costs, bound, search, layout and replay."""
