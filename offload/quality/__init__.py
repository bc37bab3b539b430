"""How much worse one model is than another: loss, greedy tokens, divergence, and the errors of layers and experts."""
