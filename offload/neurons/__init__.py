"""Feed-forwards by hidden units: a file of bundled rows and columns, proven bounds of what is active, units in memory."""
