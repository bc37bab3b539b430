"""Resident models whose bits can be compared."""

import torch
from transformers import AutoModelForCausalLM


def bits_follow_addresses():
    """Whether a product of one float32 row depends on where its weight lies: MKL on some processors (AMD's)."""
    x, memory = torch.randn(1, 64), torch.empty(64 * 64 + 16)
    weight = torch.randn(64, 64)
    products = [x @ memory[at : at + 64 * 64].view(64, 64).copy_(weight).T for at in range(16)]
    return not all(torch.equal(product, products[0]) for product in products)


def load_resident(folder, **options):
    """A checkpoint by transformers, its weights moved from where the file was mapped to memory of their own.

    A checkpoint's tensors lie at any multiple of their elements' size; see `bits_follow_addresses`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
