"""What this processor does to the bits of a resident model."""

import torch


def bits_follow_addresses():
    """Whether a product of one float32 row depends on where its weight lies: MKL on some processors (AMD's)."""
    x, memory = torch.randn(1, 64), torch.empty(64 * 64 + 16)
    weight = torch.randn(64, 64)
    products = [x @ memory[at : at + 64 * 64].view(64, 64).copy_(weight).T for at in range(16)]
    return not all(torch.equal(product, products[0]) for product in products)
