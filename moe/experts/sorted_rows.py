"""Routed rows sorted by expert: where each expert's rows end, and the weighted sum over a token's rows.

Shapes: T tokens, K slots, N = T * K rows, E experts, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing import has_known_values


@dataclass(frozen=True, eq=False)
class Groups:
    """Where each expert's rows end: on the device, and as numbers where that costs no waiting (None elsewhere)."""

    end_E: Tensor
    ends: list[int] | None
    num_rows: int

    @property
    def has_all_rows(self) -> bool:
        """Whether every row is known to belong to an expert."""
        return self.ends is not None and self.ends[-1] == self.num_rows


def groups_of(expert_N: Tensor, num_experts: int) -> Groups:
    """The ends of runs of equal ids among sorted ones; a search costs less than counting, and no waiting on a GPU.

    Raises:
        ValueError: if an id is negative, where that costs no waiting.
    """
    wanted_E = torch.arange(num_experts, device=expert_N.device)
    end_E = torch.searchsorted(expert_N, wanted_E, right=True, out_int32=True)
    if not has_known_values(expert_N):
        return Groups(end_E, None, len(expert_N))
    if len(expert_N) and (first := expert_N[0].item()) < 0:
        raise ValueError(f"expert ids must not be negative; got {first}; pass {num_experts} for an empty slot")
    return Groups(end_E, end_E.tolist(), len(expert_N))


def spans(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and their rows; `ends` holds the row after each expert's last one."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, slice(start, end)
        start = end


def combine(y_ND: Tensor, order_N: Tensor, weight_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, D]: the weighted sum over each token's rows, in the order of its slots, in the wider of both formats.

    Args:
        y_ND: rows sorted by expert.
        order_N: the routed row (`token * K + k`) at each place of that order.
        weight_TK: floating-point weight of each row, 0 in empty slots.
        dtype: number format that the sums are rounded to; usually that of the tokens.
    """
    y_TKD = torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(*weight_TK.shape, -1)
    wide = torch.promote_types(y_TKD.dtype, weight_TK.dtype)
    return torch.bmm(weight_TK[:, None].to(wide), y_TKD.to(wide))[:, 0].to(dtype)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The number format of a product with this weight: its own, or that of autocast."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
