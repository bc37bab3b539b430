"""Decentralised diffusion: denoisers trained apart on parts of the data, mixed by a router of the noisy input.

The best denoiser of all data is D(x, s) = sum_k p(k | x, s) D_k(x, s), D_k the best one of part k: members that never
met make one model. Only the members that are used run, each on the rows that chose it.

Source: McAllister et al. 2025 (Decentralized Diffusion Models), arXiv:2501.05450, section 3.

Shapes: B batch, S positions, A width of a vector, M members.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..model.denoiser import NoisyTrunk, noised
from ..parts.config import MoEConfig

Denoise = Callable[[Tensor, Tensor], Tensor]


class PartitionRouter(NoisyTrunk):
    """Which part of the data a noisy sequence came from: logits [B, M], the mean over positions.

    Args:
        config: of its decoder.
        width: A, of the vectors.
        num_members: M, parts of the data, at least 1.
        data_deviation: standard deviation of the clean vectors' entries.
    """

    def __init__(self, config: MoEConfig, width: int, num_members: int, data_deviation: float = 0.5) -> None:
        super().__init__(config, width, num_members)
        self.data_deviation = data_deviation

    def forward(self, x_BSA: Tensor, sigma_B: Tensor) -> Tensor:
        total = (sigma_B[:, None, None] ** 2 + self.data_deviation**2).sqrt()
        return self.run(x_BSA / total, sigma_B)[0].mean(dim=1)

    def loss(self, clean_BSA: Tensor, part_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Cross entropy of the part at drawn noise levels, those that the members are trained with."""
        return cross_entropy(self(*noised(clean_BSA, generator)), part_B)


class DecentralisedDenoiser(nn.Module):
    """The members' denoised sequences, weighed by the router's probabilities.

    Args:
        members: one denoiser per part of the data.
        router: logits [B, M] of the parts, from a noisy sequence and its noise level.
        members_used: how many run per sequence, the likeliest, renormalised; None runs all.

    `runs` counts sequences that each member denoised.

    Raises:
        ValueError: if there is no member, or more are used than there are.
    """

    def __init__(self, members: Sequence[Denoise], router: Denoise, members_used: int | None = None) -> None:
        super().__init__()
        if not members:
            raise ValueError("a decentralised denoiser needs at least one member; got none")
        if members_used is not None and not 1 <= members_used <= len(members):
            raise ValueError(f"members_used must lie in 1..{len(members)}; got {members_used}")
        self.members, self.router = list(members), router
        self.members_used = len(self.members) if members_used is None else members_used
        self.runs = [0] * len(self.members)
        self._modules_of_parts = nn.ModuleList(part for part in [*members, router] if isinstance(part, nn.Module))

    def forward(self, x_BSA: Tensor, sigma_B: Tensor) -> Tensor:
        weight_BK, member_BK = self.router(x_BSA, sigma_B).softmax(dim=-1).topk(self.members_used, dim=-1)
        weight_BK = weight_BK / weight_BK.sum(dim=-1, keepdim=True)
        y_BSA = torch.zeros_like(x_BSA)
        for number, member in enumerate(self.members):
            row, place = torch.where(member_BK == number)
            if len(row):
                self.runs[number] += len(row)
                y_BSA = y_BSA.index_add(0, row, member(x_BSA[row], sigma_B[row]) * weight_BK[row, place, None, None])
        return y_BSA


def nearest_parts(x_NA: Tensor, num_parts: int, *, rounds: int = 20, seed: int = 0) -> Tensor:
    """int64 [N]: the part of each row, by k-means with k-means++ starts; parts are numbered by their first row.

    Args:
        x_NA: features of the data; the paper takes those of a vision model.
        num_parts: of the partition, at least 1 and at most the number of rows.
        rounds: of Lloyd's algorithm.
        seed: draws the starts.

    Raises:
        ValueError: if there are fewer rows than parts.
    """
    if not 1 <= num_parts <= len(x_NA):
        raise ValueError(f"num_parts must lie in 1..{len(x_NA)}, the rows; got {num_parts}")
    from scipy.cluster.vq import kmeans2  # not at the top: `import moe` would take longer

    _, part_N = kmeans2(x_NA.double().numpy(), num_parts, iter=rounds, minit="++", seed=seed)
    _, part_N = torch.from_numpy(part_N).long().unique(return_inverse=True)
    first = [int((part_N == part).nonzero()[0]) for part in range(int(part_N.max()) + 1)]
    rank = torch.empty(len(first), dtype=torch.int64)
    rank[torch.tensor(first).argsort()] = torch.arange(len(first))
    return rank[part_N]
