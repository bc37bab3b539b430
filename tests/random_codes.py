"""Matrices of codes drawn at random, with bfloat16 scales and zeros."""

import torch


def random_parts(encoding, rows, columns, chance):
    """The parts of a matrix of `encoding`, as bytes."""
    parts = {
        role: torch.randint(256, (nbytes,), dtype=torch.uint8, generator=chance)
        for role, nbytes in encoding.part_bytes(rows, columns).items()
    }
    for role in parts.keys() - {"codes"}:
        numbers = torch.randn(len(parts[role]) // 2, generator=chance) * (0.02 if role == "scales" else 1)
        parts[role] = numbers.bfloat16().view(torch.uint8)
    return parts
