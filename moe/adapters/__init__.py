"""Small trained weights beside the frozen matrices of a model, which can be added into them."""
