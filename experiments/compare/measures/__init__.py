"""What is measured on a trained variant: operations, hidden units, choices of experts."""
