"""Claims about models that are trained from scratch, at equal operations or as their papers train them."""
