"""The experts of one layer, made of its dense feed-forward: copies, shards of copies, and what makes them differ.

Shapes: E experts, D model width, F hidden width of the dense feed-forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

KINDS = ("gate", "up", "down")
# numbers of random streams beside those of the matrices, which are 0 to 2
CHANNELS, ROUTER, SHARED = 3, 4, 5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What makes copies differ from the start.

    Args:
        noise: standard deviation of what is added to each copy's matrices, relative to their own; 0 adds nothing.
        drop: share of each copy's hidden channels that start anew, 0..1.
        router_std: standard deviation of the router's weights, at least 0.
        seed: of all random numbers.

    Raises:
        ValueError: if a value is out of range.
    """

    noise: float
    drop: float
    router_std: float
    seed: int

    def __post_init__(self) -> None:
        if self.noise < 0 or self.router_std < 0:
            raise ValueError(f"noise and router-std must not be negative; got {self.noise:g} and {self.router_std:g}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must lie in 0..1; got {self.drop:g}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")

    def stream(self, layer: int, copy: int, kind: int) -> torch.Generator:
        """Random numbers that depend on nothing but the seed and these numbers, so that any order gives the same."""
        state = np.random.SeedSequence([self.seed, layer, copy, kind]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


class Copies:
    """The copies of one model's feed-forwards.

    Every copy is cut into equal shards of its hidden channels, one expert each. A token's K = copies * shards weights
    sum to 1, so each shard's down projection is multiplied by the number of shards; powers of two do that exactly.

    Args:
        read: (layer, kind) -> a dense matrix, [F, D], or [D, F] of `down`.
        shards: per copy.
        difference: noise, share that starts anew, router.

    Source: Komatsuzaki et al. 2022 (sparse upcycling), arXiv:2212.05055, section 2; He et al. 2024, arXiv:2410.07524
        (granularity with virtual groups and weight scaling); Nakamura et al. 2025 (drop-upcycling), arXiv:2502.19261,
        section 3.2.
    """

    def __init__(self, read: Callable[[int, str], Tensor], shards: int, difference: Difference) -> None:
        # neighbouring experts in a file want the same matrix, and the fused gate_up_proj wants two
        self._read, self._copy = lru_cache(maxsize=2)(read), lru_cache(maxsize=2)(self._differing)
        self.shards, self.difference = shards, difference

    def matrix(self, layer: int, expert: int, kind: str) -> Tensor:
        """One matrix of one expert: [F / shards, D], or [D, F / shards] of `down`."""
        copy, shard = divmod(expert, self.shards)
        whole = self._copy(layer, copy, kind)
        if kind == "down":
            part_DF = whole.chunk(self.shards, dim=1)[shard]
            return part_DF * self.shards if self.shards > 1 else part_DF
        return whole.chunk(self.shards)[shard]

    def router_rows(self, layer: int, num_experts: int, width: int, dtype: torch.dtype) -> Tensor:
        """[E, D]: small random rows, the same for all shards of a copy (a virtual group), so that top-k takes whole
        copies."""
        generator = self.difference.stream(layer, 0, ROUTER)
        row_ED = torch.randn(num_experts // self.shards, width, generator=generator) * self.difference.router_std
        return row_ED.repeat_interleave(self.shards, dim=0).to(dtype)

    def _differing(self, layer: int, copy: int, kind: str) -> Tensor:
        noise, drop, matrix = self.difference.noise, self.difference.drop, self._read(layer, kind)
        if not noise and not drop:
            return matrix
        generator = self.difference.stream(layer, copy, KINDS.index(kind))
        wide = matrix.float()
        if noise:
            wide = wide + noise * wide.std() * torch.randn(wide.shape, generator=generator)
        if drop:
            wide_FD = restarted(wide.T if kind == "down" else wide, self._dropped(layer, copy, wide, kind), generator)
            wide = wide_FD.T if kind == "down" else wide_FD
        return wide.to(matrix.dtype)

    def _dropped(self, layer: int, copy: int, matrix: Tensor, kind: str) -> Tensor:
        """Which hidden channels of a copy start anew: the same ones in its three matrices."""
        F = matrix.shape[1 if kind == "down" else 0]
        order_F = torch.randperm(F, generator=self.difference.stream(layer, copy, CHANNELS))
        return order_F[: round(self.difference.drop * F)]


def restarted(matrix_FD: Tensor, channels: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix whose given rows are drawn from the normal distribution with the mean and deviation of those rows.

    Source: Nakamura et al. 2025 (drop-upcycling), arXiv:2502.19261, section 3.2; there they are columns.
    """
    if not len(channels):
        return matrix_FD
    old = matrix_FD[channels]
    drawn = torch.randn(old.shape, generator=generator) * old.std() + old.mean()
    return matrix_FD.index_copy(0, channels, drawn.to(matrix_FD.dtype))
