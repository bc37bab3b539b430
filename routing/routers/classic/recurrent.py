"""RMoE: a recurrent state runs through the depth of the model, so that a layer's router knows how earlier ones routed.

Source: Qiu et al. 2024, arXiv:2408.06793, eqs. 3-4. The recurrence is over layers, never over tokens: nothing crosses
decode steps.

Shapes: T tokens, D model width, R routable experts, p = width of the recurrent state.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ...choice.scored_steps import scored_steps
from ...contract.context import Carry, RoutingContext
from ...contract.module import matrix_flops
from ...contract.router import RouterSizes
from ..options import Options, expect_at_least
from .classic import ClassicRouter
from .rule import RULE_PARTS, ClassicRule

STATE = "recurrent_state"
Recurrence = Literal["full", "detach", "none"]


@dataclass(frozen=True, kw_only=True)
class RecurrentOptions(Options):
    """Options of RMoE besides those of the rule.

    Args:
        state_width: p, at least 1; published: 128.
        recurrence: `full` backpropagates through all earlier layers, `detach` keeps the state but not its gradient,
            `none` starts every layer from the zero state with the same parameters (the paper's NP).
    """

    state_width: int = 128
    recurrence: Recurrence = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("state_width", self.state_width, 1)


class RecurrentRouter(ClassicRouter):
    """Projects the hidden state, feeds it to a GRU that all layers share, and scores experts from the GRU's state.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves; layer 0 owns the shared cell, so checkpoints hold it once.
        rule: how logits become a routing.
        options: width of the state and kind of recurrence.
        cell: the GRU cell of all layers, p to p.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, RecurrentOptions)

    def __init__(
        self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: RecurrentOptions, cell: nn.GRUCell
    ) -> None:
        super().__init__(sizes, layer, rule, score_width=options.state_width)
        self.recurrence = options.recurrence
        self.projection = nn.Parameter(torch.empty(cell.hidden_size, sizes.width))
        if layer == 0:
            self.cell = cell
        self._shared = (cell,)  # in a tuple, or torch would register it again

    @classmethod
    def of_rule(cls, sizes: RouterSizes, rule: ClassicRule, *own: Any) -> list[Self]:
        """One router per MoE layer around one cell."""
        (options,) = own
        return super().of_rule(sizes, rule, options, nn.GRUCell(options.state_width, options.state_width))

    def flops(self) -> float:
        """Every layer passes the shared cell, whichever owns it."""
        cell = matrix_flops(self._shared[0])
        return super().flops() + (0.0 if self.layer == 0 else cell)

    def init_parameters(self, std: float) -> None:
        """With `init="kaiming"` projection, cell and scores all start as torch's own layers do, uniform by their width.

        With normal weights of the model's range a narrow model passes on hardly anything: a range of 0.02 at width 96
        gives logits of 0.001.
        """
        super().init_parameters(std)
        if self.rule.initial.init == "kaiming":
            cell = self._shared[0]
            for matrix in (self.projection, *((cell.weight_ih, cell.weight_hh) if self.layer == 0 else ())):
                nn.init.kaiming_uniform_(matrix, a=5**0.5)

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        before = None if self.recurrence == "none" else carry.get(STATE)
        if before is not None and self.recurrence == "detach":
            before = before.detach()
        cell = self._shared[0]
        weights = tuple(w.to(x_TD.dtype) for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
        projection, score = self.projection.to(x_TD.dtype), self.weight.to(x_TD.dtype)
        logit_TR, state = scored_steps(x_TD, before, projection, weights, score)
        return logit_TR, carry.put(**{STATE: state})
