"""Glider: a router's local scores plus one bias per expert for a whole request, from what the task is.

Source: Li et al. 2024, arXiv:2410.07172, sections 3.2-3.3; UNITES-Lab/glider. The bias enters as
`RoutingContext.logit_bias_LR`; the local gate is PHATGOOSE's.

Shapes: T tokens, D model width, R routable experts, E experts, L MoE layers, A = width of the embeddings.
"""

from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import at_least_float32, drop_padding
from ...contract.stats import RouterStats
from .classic import ClassicRouter


class GliderRouter(ClassicRouter):
    """The local gate: z = LN(x) W / sqrt(D), with a layer norm that has no parameters.

    While `tuned_expert` names an expert, every token visits it alone, with weight sigmoid(x . w): so a gate is trained
    on its frozen expert, apart from all others (Muqeeth et al. 2024 (PHATGOOSE), arXiv:2402.05859, section 3).
    """

    tuned_expert: int | None = None

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        if self.tuned_expert is None:
            return super().forward(x_TD, carry, context)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            weight_T1 = linear(x_TD, self.weight[self.tuned_expert, None].to(x_TD.dtype)).sigmoid()
            expert_T1 = torch.full_like(weight_T1, self.tuned_expert, dtype=torch.int64)
            chosen = drop_padding(self.routing(expert_T1, weight_T1), context)
            share_TR = weight_T1.new_zeros(len(x_TD), self.sizes.num_routable)
            share_TR[:, self.tuned_expert] = 1.0
            return chosen, carry, self.stats(chosen, chosen, context, probability_TR=share_TR)

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        width = x_TD.shape[-1]
        return linear(layer_norm(x_TD, (width,)), self.weight.to(x_TD.dtype)) / sqrt(width), carry

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        """By logits: with a bias of 100 or more, probabilities below the best underflow and no longer rank."""
        return super().select(logit_TR, logit_TR, context)


def task_bias(task_A: Tensor, expert_LEA: Tensor, scale: float) -> Tensor:
    """The bias [L, E] of a request: `scale` times the cosine of the task's embedding and each expert's.

    Args:
        task_A: embedding of the request's instruction.
        expert_LEA: embeddings of the instructions that each expert was trained for.
        scale: 100 for tasks that were trained on, 3 for others, as published; 0 leaves the local gate alone.

    Raises:
        ValueError: if shapes or the scale do not fit.
    """
    if task_A.ndim != 1 or expert_LEA.ndim != 3 or expert_LEA.shape[-1] != len(task_A):
        raise ValueError(
            f"expected a task embedding [A] and expert embeddings [L, E, A]; "
            f"got {tuple(task_A.shape)} and {tuple(expert_LEA.shape)}"
        )
    if not scale >= 0:
        raise ValueError(f"scale must be 0 or positive; got {scale}")
    return scale * (normalize(expert_LEA.float(), dim=-1) @ normalize(task_A.float(), dim=-1))
