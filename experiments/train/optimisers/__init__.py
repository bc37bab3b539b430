"""How weights move: AdamW, Muon for matrices and for banks of expert matrices, and both as one optimiser."""
