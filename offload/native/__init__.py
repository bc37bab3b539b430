"""The C of this package, compiled on first use, and its bindings."""
