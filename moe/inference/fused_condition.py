"""The experts of a condition as one network: routed once per condition and layer, fused, kept for the next call.

Valid only where the router reads the condition and nothing else; then every token of a sequence has the same experts
with the same weights, and K gated networks of width F are one of width K * F whose gated half is scaled.

Source: Reuss et al. 2024 (MoDE), arXiv:2412.12953, section 3.3. Official code keys its cache by the mean of the noise
embedding, which different conditions may share; here the key is the condition itself.

Shapes: B sequences, S positions, T = B * S tokens, D model width, F expert width, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from routing import Carry, ConditionRouter, RouterStats, RoutingContext

from ..layers.layer import MoELayer
from ..model.decoder import MoEForCausalLM

Network = tuple[Tensor, Tensor]


@dataclass(kw_only=True, eq=False)
class FusedCache:
    """Networks by layer, condition and version of the weights they were made of.

    `hits` and `misses` count looks at it, one per layer, sequence and call.
    """

    networks: dict[tuple[Any, ...], Network] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0

    def get(self, layer: MoELayer, condition_D: Tensor) -> Network:
        """Up projection [2 K F, D] and down projection [D, K F] of a condition."""
        versions = tuple(parameter._version for parameter in layer.parameters())
        key = (id(layer), versions, condition_D.dtype, condition_D.cpu().view(torch.uint8).numpy().tobytes())
        if key in self.networks:
            self.hits += 1
        else:
            self.misses += 1
            self.networks[key] = fuse(layer, condition_D)
        return self.networks[key]


@torch.no_grad()
def fuse(layer: MoELayer, condition_D: Tensor) -> Network:
    """The experts that a condition selects, side by side; the weights scale what enters the down projection."""
    context = RoutingContext(condition_TD=condition_D[None])
    routing, _, _ = layer.router(condition_D[None], Carry(), context)
    expert_K, weight_K = routing.expert_TK[0], routing.weight_TK[0]
    gate, up = layer.experts.gate_up_proj[expert_K].chunk(2, dim=1)
    down = layer.experts.down_proj[expert_K] * weight_K[:, None, None].to(gate.dtype)
    return torch.cat([gate.flatten(0, 1), up.flatten(0, 1)]), down.transpose(0, 1).flatten(1)


@contextmanager
def fused_experts(model: MoEForCausalLM) -> Iterator[FusedCache]:
    """Within it, the model's expert layers compute one fused network per condition instead of routed experts.

    Outputs agree with the routed ones up to rounding. Statistics of routers are not collected.

    Raises:
        ValueError: if a router reads more than the condition, the model is training, or its experts are offloaded.
    """
    layers = model.model.moe_layers
    for layer in layers:
        _expect_fusible(model, layer)
    cache = FusedCache()
    try:
        for layer in layers:
            layer.forward = _fused_forward(layer, cache)
        yield cache
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _fused_forward(layer: MoELayer, cache: FusedCache) -> Any:
    def forward(x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        if context.is_training:
            raise ValueError("experts are fused for evaluation only; call model.eval() first")
        if context.logit_bias_LR is not None or context.top_k is not None:
            raise ValueError("fused experts depend on the condition only: no logit bias, and the configured K")
        B = int(context.sequence_T[-1]) + 1
        condition_TD = torch.zeros_like(x_TD) if context.condition_TD is None else context.condition_TD
        x_BSD, condition_BD = x_TD.unflatten(0, (B, -1)), condition_TD.unflatten(0, (B, -1))[:, 0]
        outputs = []
        for x_SD, condition_D in zip(x_BSD, condition_BD, strict=True):
            up_proj, down_proj = cache.get(layer, condition_D)
            gate, up = nn.functional.linear(x_SD, up_proj).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(layer.experts.act_fn(gate) * up, down_proj))
        y_TD = torch.cat(outputs)
        return y_TD if layer.shared is None else y_TD + layer.shared(x_TD), carry, []

    return forward


def _expect_fusible(model: MoEForCausalLM, layer: nn.Module) -> None:
    router = getattr(layer, "router", None)
    if not isinstance(router, ConditionRouter) or router.reads != "condition":
        raise ValueError(
            "experts can be fused per condition only if routers read the condition and nothing else: "
            f"architecture 'mode' with reads='condition'; got {model.config.architecture!r} with "
            f"{model.config.architecture_options or {}}"
        )
    if model.training:
        raise ValueError("experts are fused for evaluation only; call model.eval() first")
    if model.config.zero_compute_experts:
        raise ValueError("models with zero-compute experts cannot be fused")
    if not hasattr(layer.experts, "gate_up_proj"):
        raise ValueError("the experts of this model are offloaded; fusing needs them in memory")
