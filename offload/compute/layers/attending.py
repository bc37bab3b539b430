"""Whether our attention of one token has torch's bits: compared at several lengths, for each shape of heads.

Shapes: H heads of queries, J heads of keys and values, S positions, W head width.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from .structs import Heads, Place, attend

TRIED_POSITIONS = (1, 2, 7, 16, 33, 100, 255, 511, 512, 513, 1025)
"""Lengths of a trial: with every kind of remainder, and around the 512 positions that torch takes at a time."""
CANCELLING_SCALE = 1e5
"""Of products that are rounding errors alone, about 1e-6 and 0 without rounding: exponentials then show their order."""


def attends_like_torch(heads: Heads, scale: float) -> bool:
    """Whether our attention is bit-identical to torch's with the number of threads in use.

    Args:
        heads: their numbers and width.
        scale: of the model's products, above 0.
    """
    return _is_like_torch(heads.heads, heads.shared_heads, heads.width, scale, torch.get_num_threads())


def attended(heads: Heads, query_1H1W: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """`softmax(scale query keys^T) values`, `[1, H, 1, W]`; None if it cannot be computed here in torch's order.

    Args:
        heads: their numbers, width and scale.
        query_1H1W: bfloat16, contiguous.
        keys, values: `[1, J, S, W]`; each head contiguous.
    """
    out_1H1W = torch.empty_like(query_1H1W)
    places = (Place(states.data_ptr(), states.stride(1)) for states in (keys, values))
    is_done = attend()(heads, keys.shape[2], query_1H1W.data_ptr(), *places, out_1H1W.data_ptr())
    return out_1H1W if is_done else None


@cache
@torch.no_grad()
def _is_like_torch(heads: int, shared_heads: int, width: int, scale: float, threads: int) -> bool:
    for query, keys, values, by in _operands(heads, shared_heads, width, scale):
        found = attended(Heads(heads, shared_heads, width, by), query, keys, values)
        if found is None:
            return False
        is_shared = shared_heads < heads
        if not torch.equal(found, scaled_dot_product_attention(query, keys, values, scale=by, enable_gqa=is_shared)):
            return False
    return True


def _operands(
    heads: int, shared_heads: int, width: int, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Queries, keys, values and scales: random ones, and ones whose sums are rounding errors.

    All heads have the same keys and values, which begin at addresses of every kind; queries differ.
    """
    generator, most, half = torch.Generator().manual_seed(0), max(TRIED_POSITIONS), width // 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, keys, values = normal(1, heads, 1, width), normal(1, 1, most + 1, width), normal(1, 1, most + 1, width)
    sizes = normal(1, 1, most + 1, 1).mul(3).exp()
    pairs, cancelling = query.clone(), keys.clone()
    pairs[..., half : 2 * half], cancelling[..., half : 2 * half] = query[..., :half], -keys[..., :half]
    for positions in TRIED_POSITIONS:
        first, middle = most + 1 - positions, positions // 2
        weighed = (values * sizes)[:, :, first:].clone()
        weighed[:, :, middle : 2 * middle] = -weighed[:, :, :middle]
        for q, k, by in ((query, keys, scale), (pairs, cancelling, CANCELLING_SCALE)):
            shared = (each.bfloat16()[:, :, -positions:].expand(1, shared_heads, -1, -1) for each in (k, weighed))
            yield q.bfloat16(), *shared, by
