"""What every layer is built from: configuration, norms, linear layers, attention, text, operation counts."""
