"""Feed-forwards and experts by hidden units: bundled on disk, bounds of what is active, units in memory."""
