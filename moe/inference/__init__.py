"""What a caller may change on a trained model: rewiring, skipping, fused experts, ensembles."""
