"""Null experts: the load that they leave to FFN experts, and how a trained router gets rows for them.

Source: Zeng et al. 2024 (AdaMoE), arXiv:2406.13233.
"""

import torch
from torch import Tensor


def expected_true_load(num_experts: int, num_nulls: int, top_k: int) -> float:
    """FFN experts per token when all routable experts are equally loaded: `E K / (E + Z)`."""
    return num_experts * top_k / (num_experts + num_nulls)


@torch.no_grad()
def copy_ffn_rows_to_nulls(weight_RD: Tensor, num_experts: int, noise: float) -> None:
    """Set the router rows of the nulls to copies of the FFN rows, so that the load starts near its target.

    Args:
        weight_RD: router weights, FFN rows first; changed in place.
        num_experts: E; the rows after the first E are the nulls'.
        noise: standard deviation, relative to the rows' own, of what is added to a copy: exact twins tie, and which of
            them top-k takes is then arbitrary.

    Raises:
        ValueError: if the nulls are not a multiple of the FFN experts.
    """
    num_nulls = len(weight_RD) - num_experts
    if num_nulls % num_experts:
        raise ValueError(f"copies need a multiple of {num_experts} nulls; got {num_nulls}")
    copies = weight_RD[:num_experts].repeat(num_nulls // num_experts, 1)
    weight_RD[num_experts:] = copies + noise * copies.std() * torch.randn_like(copies)
