"""Local searches, one per kind of objective."""
