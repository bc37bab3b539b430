"""Input data: measured loads, topologies, generated workloads."""
