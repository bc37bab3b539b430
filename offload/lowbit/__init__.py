"""Low-bit experts of our own: methods that quantise, what they learn from the model, how many bits go where."""
