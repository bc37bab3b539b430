"""Feed-forwards by hidden units: bundled rows and columns on disk, proven bounds of what is active, units in memory."""
