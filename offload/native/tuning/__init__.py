"""What fine-tuning computes in C beside products: adapters, gates and their gradients, steps along directions."""
