"""What the codes of a quantised matrix mean: one description, its definition in torch, its expansion in C."""
