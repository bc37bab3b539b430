"""Which experts stay in fast memory: policies, slots per layer, simulation on traces."""
