"""What fine-tuning computes in C between the products with frozen matrices: adapters, and gates with their gradients."""
