"""Duo-LLM: each layer has a big and a small feed-forward and can be skipped; which token takes which is learnt.

Shapes: T tokens, D model width, L layers, R modules of a layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from routing import Carry, RouterModule, RouterSizes, RouterStats, Routing, RoutingContext

from ..layers.layer import FeedForward, RoutedLayer
from ..layers.stack import Stack, StackInputs, StackOutput
from ..parts.config import MoEConfig
from ..parts.flops import LayerFlops, projection_flops
from .body import Body

Stage = Literal["random", "router"]
# ids of a layer's modules, in the order in which the layer holds them
BIG, SMALL, SKIP = 0, 1, 2


class DuoRouter(RouterModule):
    """Which of a layer's modules a token takes: `BIG`, `SMALL` or, if the layer has it, `SKIP`.

    A route in the carry decides whenever there is one. Otherwise, in stage `random`, training draws a module for each
    token and layer and evaluation takes the big one; in stage `router`, training mixes all modules by
    `softmax(W x / temperature)` and evaluation takes the likeliest with weight 1.

    Args:
        sizes: D, and as "experts" the two feed-forwards, with a `zero` expert for skipping.
        layer: which layer this router serves.
        stage: `random` draws modules in training, `router` learns them.
        temperature: inside the exponential, before the first step.
        final_temperature: from step `temperature_steps` on; in between it falls geometrically.
        temperature_steps: optimiser steps until `final_temperature`, at least 1.

    Source: Alizadeh et al. 2024 (Duo-LLM), arXiv:2410.10846, sections 3.1 and 3.3.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        stage: Stage,
        temperature: float = 1.0,
        final_temperature: float = 1.0,
        temperature_steps: int = 1,
    ) -> None:
        super().__init__(sizes, layer)
        self.stage = stage
        self.temperature, self.final_temperature = temperature, final_temperature
        self.temperature_steps = temperature_steps
        self.weight = nn.Parameter(torch.empty(sizes.num_routable, sizes.width))

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TR = linear(x_TD.to(self.weight.dtype), self.weight)
            probability_TR = (logit_TR / self.temperature_at(context.step)).softmax(dim=-1)
        R, route_TL = self.sizes.num_routable, carry.get("route")
        if route_TL is not None:
            routing = self._single(route_TL[:, self.layer])
        elif self.stage == "random":
            draws_T = torch.randint(R, (len(x_TD),), device=x_TD.device)
            routing = self._single(draws_T if context.is_training else torch.zeros_like(draws_T))
        elif context.is_training:
            every_TR = torch.arange(R, device=x_TD.device).expand_as(probability_TR)
            routing = self.routing(every_TR, probability_TR)
        else:
            routing = self._single(probability_TR.argmax(dim=-1))
        # no logits: the z-loss of expert routers is not meant for these
        return routing, carry, self.stats(routing, routing, context, probability_TR=probability_TR)

    def temperature_at(self, step: int) -> float:
        """The temperature at an optimiser step."""
        share = min(1.0, step / self.temperature_steps)
        return self.temperature * (self.final_temperature / self.temperature) ** share

    def _single(self, module_T: Tensor) -> Routing:
        return self.routing(module_T[:, None], torch.ones(len(module_T), 1, device=module_T.device))


class DuoLayer(RoutedLayer):
    """A big and a small feed-forward; each computes the tokens that take it, skipping computes nothing.

    Args:
        config: D, and the big one's width `intermediate_size`.
        small_width: of the small one.
    """

    def __init__(self, config: MoEConfig, router: DuoRouter, small_width: int) -> None:
        super().__init__()
        self.router = router
        self.big = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.small = FeedForward(config.hidden_size, small_width, config.hidden_act)

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        y_TD = torch.zeros_like(x_TD)
        for module_id, module in ((BIG, self.big), (SMALL, self.small)):
            token_N, slot_N = torch.where(routing.expert_TK == module_id)
            weight_N1 = routing.weight_TK[token_N, slot_N, None].to(x_TD.dtype)
            y_TD = y_TD.index_add(0, token_N, weight_N1 * module(x_TD[token_N]))
        return y_TD, carry, [stats]

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        per_module = (projection_flops(self.big), projection_flops(self.small))
        return LayerFlops(experts=sum(float(loads[0][place]) * cost for place, cost in enumerate(per_module)))


class DuoStack(Stack):
    """The plain stack, with the loss that holds the share of big modules to a budget, and routes to follow.

    Args:
        budget: wanted share of big modules.
        weight: of the loss; 0 for none.
    """

    def __init__(self, budget: float, weight: float) -> None:
        super().__init__()
        self.budget, self.weight = budget, weight
        self._route_TL: Tensor | None = None

    @contextmanager
    def following(self, route_TL: Tensor) -> Iterator[None]:
        """Inside, token t of every call takes module `route_TL[t, l]` in layer l."""
        self._route_TL = route_TL
        try:
            yield
        finally:
            self._route_TL = None

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        if self._route_TL is not None:
            carry = carry.put(route=self._expect_fits(x_BSD, layers))
        output = super().forward(layers, x_BSD, carry, inputs)
        if inputs.context.is_training and self.weight and self._route_TL is None:
            output.losses["budget"] = self.weight * budget_loss(output.router_stats, self.budget)
        return output

    def _expect_fits(self, x_BSD: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        routed = [layer.mlp for layer in layers if isinstance(layer.mlp, DuoLayer)]
        wanted, modules = (x_BSD.shape[0] * x_BSD.shape[1], len(routed)), routed[0].router.sizes.num_routable
        route_TL = self._route_TL
        if tuple(route_TL.shape) != wanted or int(route_TL.min()) < 0 or int(route_TL.max()) >= modules:
            raise ValueError(
                f"a route must be {wanted[0]} tokens by {wanted[1]} layers of ids 0..{modules - 1}; "
                f"got {tuple(route_TL.shape)} of {int(route_TL.min())}..{int(route_TL.max())}"
            )
        return route_TL


def budget_loss(stats: Sequence[RouterStats], budget: float) -> Tensor:
    """Squared distance from a budget of a sequence's mean probability of the big module over its tokens and layers.

    There is one mean per sequence, so that layers and tokens may differ as long as the sequence keeps to the budget;
    then the mean over sequences.

    Args:
        stats: one per layer, with `sequence_T`.
        budget: wanted share of big modules.

    Source: Alizadeh et al. 2024 (Duo-LLM), arXiv:2410.10846, section 3.3.
    """
    big_T = torch.stack([layer.probability_TR[:, BIG] for layer in stats]).mean(dim=0)
    sequence_T = stats[0].sequence_T
    if sequence_T is None:
        return (big_T.mean() - budget).square()
    rows = int(sequence_T.max()) + 1
    count_B = torch.bincount(sequence_T, minlength=rows)
    mean_B = big_T.new_zeros(rows).index_add(0, sequence_T, big_T) / count_B.clamp_min(1)
    return (mean_B[count_B > 0] - budget).square().mean()


def duo_llm(
    config: MoEConfig,
    *,
    stage: Stage = "random",
    skip: bool = False,
    small_width: int | None = None,
    budget: float = 0.5,
    budget_weight: float = 1.0,
    temperature: float = 1.0,
    final_temperature: float = 1.0,
    temperature_steps: int = 1,
) -> Body:
    """Big and small feed-forwards in every layer; train stage `random` first, then stage `router` on its weights.

    Args:
        config: D, L and `intermediate_size`, the big one's width; experts and expert routers are not used.
        stage: `random` draws modules in training and is all big outside it; `router` learns which token takes which.
        skip: whether tokens may also skip a layer's feed-forward.
        small_width: of the small one; a sixteenth of the big one without it.
        budget: share of big modules that stage `router` is held to.
        budget_weight: of the loss that does so.
        temperature, final_temperature, temperature_steps: of the router, which hardens as they fall.

    Raises:
        ValueError: if an option is unknown or out of range.
    """
    small_width = max(1, config.intermediate_size // 16) if small_width is None else small_width
    if stage not in get_args(Stage):
        raise ValueError(f"stage must be one of {', '.join(get_args(Stage))}; got {stage!r}")
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is a share of layers and must lie in 0..1; got {budget}")
    for name, value in (("temperature", temperature), ("final_temperature", final_temperature)):
        if value <= 0:
            raise ValueError(f"{name} must be positive; got {value}")
    for name, count in (("temperature_steps", temperature_steps), ("small_width", small_width)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    sizes = RouterSizes(
        width=config.hidden_size,
        num_experts=2,
        top_k=1,
        num_layers=config.num_moe_layers,
        zero_compute=("zero",) if skip else (),
    )
    cooling = (temperature, final_temperature, temperature_steps)
    routers = [DuoRouter(sizes, layer, stage, *cooling) for layer in range(config.num_moe_layers)]
    return Body(
        layers=[DuoLayer(config, router, small_width) for router in routers],
        stack=DuoStack(budget, budget_weight if stage == "router" else 0.0),
    )
