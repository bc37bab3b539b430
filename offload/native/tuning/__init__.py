"""What fine-tuning computes in C between products with frozen matrices: adapters, gates and their gradients."""
