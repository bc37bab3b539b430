"""Deterministic routing by modality: the modality is the expert, weight 1, nothing learnt and nothing to balance.

Source: Liang et al. 2024 (Mixture-of-Transformers), arXiv:2411.04996, section 2.

Shapes: T tokens, E modalities.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from .fixed import fixed_routing


class ModalityRouter(RouterModule):
    """Sends every token to the expert of its modality.

    Args:
        sizes: E modalities, K = 1.
        layer: which MoE layer this router serves.
        first_ids: the first token id of each modality, rising from 0; a call may give modalities itself.

    Raises:
        ValueError: if there is not one range per expert, K is not 1, or there are zero-compute experts.
    """

    has_fixed_top_k = True

    def __init__(self, sizes: RouterSizes, layer: int, first_ids: Sequence[int]) -> None:
        super().__init__(sizes, layer)
        expect_first_ids(first_ids, sizes.num_experts)
        if sizes.top_k != 1 or sizes.zero_compute:
            raise ValueError(
                "a modality has one expert: num_experts_per_tok must be 1 and zero_compute_experts empty; "
                f"got {sizes.top_k} and {list(sizes.zero_compute)}"
            )
        self.first_ids = tuple(first_ids)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        modality_T = modality_of(context, self.first_ids)
        weight_T1 = torch.ones(len(modality_T), 1, device=x_TD.device)
        return fixed_routing(self, self.routing(modality_T[:, None], weight_T1), carry, context)


def modality_of(context: RoutingContext, first_ids: Sequence[int]) -> Tensor:
    """int64 [T]: the modalities that the call gives, or else those of the token ids' ranges.

    Raises:
        ValueError: if a given modality has no expert, or there are neither modalities nor token ids.
    """
    if context.modality_T is not None:
        low, high = context.modality_T.aminmax()
        if low < 0 or high >= len(first_ids):
            raise ValueError(f"modalities must lie in 0..{len(first_ids) - 1}; got {int(low)}..{int(high)}")
        return context.modality_T.long()
    if context.token_id_T is None:
        raise ValueError("the model got embeddings instead of input_ids, so it needs modality=[B, S] as well")
    border = torch.tensor(first_ids[1:], dtype=torch.int64, device=context.token_id_T.device)
    return torch.bucketize(context.token_id_T.contiguous(), border, right=True)


def expect_first_ids(first_ids: Sequence[int], num_modalities: int) -> None:
    """Raises ValueError unless there is one rising range of token ids per modality, the first from 0."""
    rises = all(a < b for a, b in pairwise(first_ids))
    if len(first_ids) != num_modalities or not first_ids or first_ids[0] != 0 or not rises:
        raise ValueError(
            f"first_ids must give the first token id of each of the {num_modalities} modalities (num_experts), "
            f"rising from 0; got {list(first_ids)}"
        )
