"""Numbers as E4M3, a byte each, with one float32 scale for 128 of them. This is not exact.

Source: Xi et al. 2024 (COAT), arXiv:2410.19313, section 4, for activations in E4M3 by groups; OCP 8-bit Floating Point
Specification for E4M3, whose largest number is 448.
"""

import torch

GROUP = 128
"""Numbers that share a scale: 3 % more bytes. COAT takes groups of 1 x 16 to 1 x 128 of a row."""
LARGEST = 448.0
"""Of E4M3."""
BYTES_PER_NUMBER = 1 + 4 / GROUP
"""A code, and a share of a float32 scale."""


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of flat floating-point numbers, a byte each, and the float32 scales of their groups."""
    padded = torch.nn.functional.pad(values.float(), (0, -len(values) % GROUP)).view(-1, GROUP)
    scales = (padded.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (padded / scales.unsqueeze(1)).to(torch.float8_e4m3fn)
    return codes.view(-1)[: len(values)].view(torch.uint8), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The flat numbers that codes stand for."""
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % GROUP)).view(torch.float8_e4m3fn).float()
    return (padded.view(-1, GROUP) * scales.unsqueeze(1)).view(-1)[: len(codes)].to(dtype)
