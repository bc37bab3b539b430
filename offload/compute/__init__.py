"""Products that are bit-identical to the resident model's, for one token and for many."""
