"""How the numbers of each stored form are made from its bytes, in C."""
