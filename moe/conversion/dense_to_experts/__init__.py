"""Read-ME: a dense model refactored into experts behind one router."""
