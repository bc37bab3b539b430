"""Claims about what is done to a trained model: adapters, cuts, conversions, what decoding leaves out."""
