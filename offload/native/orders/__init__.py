"""Orders of summation in C: how the products of a strip of a matrix are added."""
