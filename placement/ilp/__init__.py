"""Integer programmes: the only folder that imports PuLP."""
