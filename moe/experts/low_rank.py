"""Low-rank experts: adapters of two narrow matrices beside a feed-forward network that all tokens pass.

Shapes: T tokens, K slots, E experts, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..parts.config import MoEConfig


class LowRankExperts(nn.Module):
    """`y = sum over a token's experts of w_i B_i A_i x / rank`; B starts at 0, so an untrained expert adds nothing.

    Args:
        config: gives E and D.
        rank: rows of A, columns of B.

    Raises:
        ValueError: if the rank is out of range.

    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685, section 4.1; scaled as Glider's code scales.
    """

    def __init__(self, config: MoEConfig, rank: int) -> None:
        super().__init__()
        E, D = config.num_experts, config.hidden_size
        if not 1 <= rank <= D:
            raise ValueError(f"rank must lie in 1..{D}, the model's width; got {rank}")
        self.up_proj = nn.Parameter(torch.empty(E, rank, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, rank))

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.up_proj, std=self.up_proj.shape[-1] ** -0.5)
        nn.init.zeros_(self.down_proj)

    def flops(self, load_E: Tensor) -> float:
        """Operations per token of the text, of which `load_E` visit each expert."""
        return 2.0 * float(load_E.sum()) * (self.up_proj[0].numel() + self.down_proj[0].numel())

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D]; ids >= E contribute nothing."""
        E, rank, _ = self.up_proj.shape
        y_TD = torch.zeros_like(x_TD)
        for expert in (expert for expert in expert_TK.unique().tolist() if expert < E):
            token_id, slot = torch.where(expert_TK == expert)
            y = linear(linear(x_TD[token_id], self.up_proj[expert]), self.down_proj[expert])
            y_TD = y_TD.index_add(0, token_id, (y * (weight_TK[token_id, slot, None] / rank)).to(y_TD.dtype))
        return y_TD
