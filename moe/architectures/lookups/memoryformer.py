"""MemoryFormer's feed-forward: matrices become tables of vectors that pieces of the input are hashed into.

    y = sum_k p(z_k) T_k[h(z_k)],   h the signs of piece z_k read as a number,   p = prod_i sigmoid(2 |z_ki| / t)

p is the share of h(z_k) among all corners of the cube of signs, and through it the gradient reaches the input.

Source: Ding et al. 2024 (MemoryFormer), arXiv:2411.12992, section 2.2; C0-Design/MemoryFormer. Of its two tables in a
row the second reads pieces of `extra_bits` more; the norm between them is ours. Attention's projections stay linear.

Shapes: T tokens, D model width, K pieces per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from routing import Carry, RouterStats, RoutingContext, gather_sum

from ...layers.layer import RoutedLayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops
from ...parts.norm import RMSNorm
from ..body import Body


def memoryformer(config: MoEConfig, *, bits: int = 4, extra_bits: int = 2, temperature: float = 1.0) -> Body:
    """Two hashed tables in a row in every routed place; the router and the experts of the config are not used.

    Args:
        bits: entries of a piece of the token, which divide D: 2 ** bits vectors per piece.
        extra_bits: further entries of the pieces between the two tables.
        temperature: t; smaller makes a piece surer of its corner.

    Raises:
        ValueError: if the pieces do not divide the width, or a number is out of range.
    """
    if not 1 <= bits <= 16 or config.hidden_size % bits or not 0 <= extra_bits <= 8 or temperature <= 0:
        raise ValueError(
            f"bits must divide hidden_size ({config.hidden_size}) and lie in 1..16, extra_bits in 0..8, temperature be "
            f"positive; got {bits}, {extra_bits}, {temperature}"
        )
    pieces, D = config.hidden_size // bits, config.hidden_size
    inner = pieces * (bits + extra_bits)
    return Body(
        layers=[
            HashedFeedForward(
                HashedTable(pieces, bits, inner, temperature),
                RMSNorm(inner, eps=config.rms_norm_eps),
                HashedTable(pieces, bits + extra_bits, D, temperature),
            )
            for _ in range(config.num_moe_layers)
        ]
    )


class HashedTable(nn.Module):
    """A map of vectors by tables instead of a matrix.

    Args:
        pieces: K, of the input.
        bits: entries of a piece; its signs choose one of 2 ** bits rows of the piece's table.
        out_width: of the vectors in the tables.
        temperature: t.
    """

    def __init__(self, pieces: int, bits: int, out_width: int, temperature: float) -> None:
        super().__init__()
        self.pieces, self.bits, self.temperature = pieces, bits, temperature
        self.table = nn.Parameter(torch.empty(pieces * 2**bits, out_width))

    def forward(self, x_TD: Tensor) -> Tensor:
        piece = x_TD.unflatten(-1, (self.pieces, self.bits))
        place = 2 ** torch.arange(self.bits, device=x_TD.device)
        first_row_K = torch.arange(self.pieces, device=x_TD.device) * 2**self.bits
        row_TK = ((piece > 0) * place).sum(dim=-1) + first_row_K
        share_TK = logsigmoid(piece.abs() * (2 / self.temperature)).sum(dim=-1).exp()
        return gather_sum(share_TK.to(self.table.dtype), self.table, row_TK)


class HashedFeedForward(RoutedLayer):
    """Two tables in a row with a norm between them.

    Args:
        first, second: the tables.
        norm: of what the first gives.
    """

    def __init__(self, first: HashedTable, norm: nn.Module, second: HashedTable) -> None:
        super().__init__()
        self.first, self.norm, self.second = first, norm, second

    @property
    def routers(self) -> list[nn.Module]:
        return []

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        return self.second(self.norm(self.first(x_TD))).to(x_TD.dtype), carry, []

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """A vector per piece is weighed and added."""
        widths = sum(table.pieces * table.table.shape[1] for table in (self.first, self.second))
        return LayerFlops(shared=passes * 2.0 * widths)
