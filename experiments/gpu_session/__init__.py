"""`make gpu`: everything that needs an NVIDIA GPU, in the order of importance, within nine minutes."""
