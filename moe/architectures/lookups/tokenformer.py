"""TokenFormer's feed-forward: a token attends to n learned pairs of keys and values.

    y = sum_j f(a_j sqrt(n_0) / |a|) v_j,   a = K x,   f = GELU,   n_0 the pairs that training began with

New pairs with keys of 0 change nothing: their scores are 0, and n_0 stays. So a trained model grows.

Source: Wang et al. 2024 (TokenFormer), arXiv:2410.23168, equations 5-8. The paper's attention projections are of the
same kind; here they stay linear.

Shapes: T tokens, D model width, N rows of both tables.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from routing import Carry, RouterStats, RoutingContext

from ...layers.layer import RoutedLayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops
from ..body import Body


def tokenformer(config: MoEConfig, *, tokens: int | None = None, first_tokens: int | None = None) -> Body:
    """A layer of learned pairs in every routed place; the router and the experts of the config are not used.

    Args:
        tokens: n, pairs per layer; `intermediate_size` if not given.
        first_tokens: n_0, the pairs that training began with; as many as there are if not given.

    Raises:
        ValueError: if there are fewer pairs than training began with.
    """
    tokens = config.intermediate_size if tokens is None else tokens
    first_tokens = tokens if first_tokens is None else first_tokens
    if not 1 <= first_tokens <= tokens:
        raise ValueError(f"first_tokens must lie in 1..{tokens}, the tokens of the layer; got {first_tokens}")
    return Body(layers=[Pattention(config.hidden_size, tokens, first_tokens) for _ in range(config.num_moe_layers)])


class Pattention(RoutedLayer):
    """Attention of tokens to parameters.

    Args:
        width: D, in and out.
        tokens: n, pairs of keys and values.
        first_tokens: n_0, whose root scales the scores.
    """

    def __init__(self, width: int, tokens: int, first_tokens: int) -> None:
        super().__init__()
        self.scale = sqrt(first_tokens)
        self.keys = nn.Parameter(torch.empty(tokens, width))
        self.values = nn.Parameter(torch.empty(tokens, width))

    @property
    def routers(self) -> list[nn.Module]:
        return []

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        score_TN = linear(x_TD, self.keys)
        exact = torch.promote_types(score_TN.dtype, torch.float32)
        length_T1 = torch.linalg.vector_norm(score_TN, dim=-1, keepdim=True, dtype=exact).clamp_min(1e-12)
        return gelu(score_TN * (self.scale / length_T1).to(score_TN.dtype)) @ self.values, carry, []

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        return LayerFlops(shared=passes * 2.0 * (self.keys.numel() + self.values.numel()))
