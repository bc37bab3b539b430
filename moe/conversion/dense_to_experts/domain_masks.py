"""Which hidden channels of a dense feed-forward each domain uses, and the experts that follow from it.

Shapes: T tokens, L layers, F hidden channels of the dense feed-forward, E domains (one expert each), B sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hidden_channels(dense: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each call of a dense transformers model leaves what enters every `down_proj`, [B, S, F] per layer."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handles = [layer.mlp.down_proj.register_forward_pre_hook(note) for layer in dense.model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_activations(dense: nn.Module, token_BS: Tensor) -> Tensor:
    """float32 [B, L, F]: mean absolute activation of each channel over each sequence."""
    rows = []
    with hidden_channels(dense) as seen:
        for token_S in token_BS:
            dense.model(token_S[None], use_cache=False)
            rows.append(torch.stack([h_BSF.float().abs().mean(dim=(0, 1)) for h_BSF in seen]))
            seen.clear()
    return torch.stack(rows)


def cluster(activation_BLF: Tensor, num_domains: int, *, rounds: int = 50, seed: int = 0) -> Tensor:
    """int64 [B]: which of `num_domains` groups of like sequences each one belongs to, by k-means on unit vectors.

    Raises:
        ValueError: if there are fewer sequences than domains.
    """
    if len(activation_BLF) < num_domains:
        raise ValueError(
            f"{num_domains} domains need at least as many sequences; the texts hold {len(activation_BLF)}, give more"
        )
    x = activation_BLF.flatten(1)
    x = x - x.mean(dim=0)
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:1]]
    while len(centres) < num_domains:  # the sequence farthest from all centres so far
        farthest = torch.cdist(x, centres).min(dim=1).values.argmax()
        centres = torch.cat([centres, x[farthest][None]])
    domain_B = torch.cdist(x, centres).argmin(dim=1)
    for _ in range(rounds):
        for domain in range(num_domains):
            if (domain_B == domain).any():
                centres[domain] = x[domain_B == domain].mean(dim=0)
        moved = torch.cdist(x, centres).argmin(dim=1)
        if torch.equal(moved, domain_B):
            break
        domain_B = moved
    return domain_B


@dataclass(frozen=True, eq=False)
class LayerSlices:
    """How one dense feed-forward is cut.

    Args:
        is_kept_EF: each domain's mask.
        permanent: channels of all masks, ascending; held once.
        experts: the other channels of each mask, ascending; equally many for every expert of the layer.
    """

    is_kept_EF: Tensor
    permanent: Tensor
    experts: tuple[Tensor, ...]


def slice_layer(activation_EF: Tensor, keep: float, align: int) -> LayerSlices:
    """Each domain's strongest channels; what all domains keep becomes permanent.

    Every mask has the same size, so within a layer experts are equally wide and nothing is padded; between layers they
    differ. Widths are multiples of `align`: a few of the weakest common channels are held by every expert instead of
    once, which costs storage and changes no result.

    Args:
        activation_EF: mean absolute activation per domain.
        keep: share of the channels that a mask keeps.
        align: widths are multiples of this.

    Source: Cai et al. 2024 (Read-ME), arXiv:2410.19123, section 3.1.
    """
    E, F = activation_EF.shape
    width = max(align, round(keep * F / align) * align)
    if not align <= width <= F:
        raise ValueError(f"cannot keep {keep:g} of {F} channels in multiples of {align}")
    kept_EW = activation_EF.topk(width, dim=-1).indices
    is_kept_EF = torch.zeros(E, F, dtype=torch.bool).scatter(1, kept_EW, True)
    common = is_kept_EF.all(dim=0).nonzero()[:, 0]
    num_permanent = min(len(common), width - align) // align * align
    strongest = activation_EF.mean(dim=0)[common].argsort(descending=True, stable=True)
    permanent = common[strongest[:num_permanent]].sort().values
    is_own_EF = is_kept_EF.clone()
    is_own_EF[:, permanent] = False
    return LayerSlices(is_kept_EF, permanent, tuple(row.nonzero()[:, 0] for row in is_own_EF))
