"""Low-bit experts of our own: methods that quantise, what they need to know of the model, and how many bits go where."""
