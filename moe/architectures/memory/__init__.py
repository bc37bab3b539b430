"""Memory layers: PEER and UltraMem, whose experts are rows of large tables."""
