"""Routers by config: every router of `routing.ROUTERS` that has a twin here, with the settings of the original.

The originals are built without memory (torch's meta device) and only read, so that names, defaults and the checks of
options have one home.
"""

from collections.abc import Callable
from typing import Any

import torch
from flax import nnx
from jax import Array

from routing import ROUTERS, build_routers

from ...parts.config import MoEConfig
from .assignment import Carry, RouterStats, Routing, RoutingContext
from .classic import ClassicRouter
from .device_balance import DeviceBalancedRouter
from .pathway import PathwayRouter
from .recurrent import GRUCell, RecurrentRouter


class PreGate(nnx.Module):
    """One block of a pre-gated model: takes the plan made for it, and makes the plan of a later block.

    Args:
        layer: the block that this module stands in.
        ahead: how many blocks earlier a gate is read.
        own_gate: the gate of this block, if it stands among the first `ahead`.
        pre_gate: the gate of block `layer + ahead`, if there is one.

    Source: Hwang et al. 2023 (Pre-gated MoE), arXiv:2308.12066, section 4.1. See `routing.PreGate`.
    """

    def __init__(self, layer: int, ahead: int, own_gate: ClassicRouter | None, pre_gate: ClassicRouter | None) -> None:
        self.layer, self.ahead = layer, ahead
        self.own_gate, self.pre_gate = own_gate, pre_gate

    def __call__(self, x_TD: Array, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        if self.own_gate is not None:
            routing, carry, stats = self.own_gate(x_TD, carry, context)
        else:
            routing, stats = carry[f"plan_{self.layer}"]
            carry = {name: value for name, value in carry.items() if name != f"plan_{self.layer}"}
        if self.pre_gate is not None:
            plan, carry, plan_stats = self.pre_gate(x_TD, carry, context)
            carry = carry | {f"plan_{self.layer + self.ahead}": (plan, plan_stats)}
        return routing, carry, stats


def build_twins(config: MoEConfig, rngs: nnx.Rngs) -> list[ClassicRouter | PreGate]:
    """One router per MoE layer.

    Raises:
        ValueError: if the config's router or an option is unknown, or its router or architecture has no twin here.
    """
    if config.architecture != "moe":
        raise ValueError(f"the architecture {config.architecture!r} has no JAX twin; train it with --backend torch")
    if config.reuse_loss_weight or config.mtp_depth:
        raise ValueError("reuse losses and multi-token prediction have no JAX twin; train with --backend torch")
    with torch.device("meta"):
        originals = build_routers(config.router, config.router_sizes, config.router_options)
    return _twins(originals, config, rngs)


def deciding_gates(routers: list[ClassicRouter | PreGate]) -> list[ClassicRouter]:
    """For each block, the gate that decides for it; in a pre-gated model it stands in an earlier block."""
    if not isinstance(routers[0], PreGate):
        return routers
    return [router.own_gate or routers[layer - router.ahead].pre_gate for layer, router in enumerate(routers)]


def _twins(originals: list[Any], config: MoEConfig, rngs: nnx.Rngs) -> list[ClassicRouter | PreGate]:
    kind = type(originals[0]).__name__
    if kind not in TWINS:
        having = [name for name, row in ROUTERS.items() if row.kind.__name__ in TWINS]
        raise ValueError(
            f"the router {config.router!r} ({kind}) has no JAX twin; train it with --backend torch, or take one of "
            f"{', '.join(having)}"
        )
    return TWINS[kind](originals, config, rngs)


def _classic(originals: list[Any], config: MoEConfig, rngs: nnx.Rngs) -> list[ClassicRouter]:
    std = config.initializer_range
    if originals[0].rule.balance.balance_loss == "global_batch":
        raise ValueError("the global-batch balance loss has no JAX twin; train with --backend torch")
    return [ClassicRouter(one.sizes, one.layer, one.rule, std, rngs) for one in originals]


def _device_balanced(originals: list[Any], config: MoEConfig, rngs: nnx.Rngs) -> list[ClassicRouter]:
    return [
        DeviceBalancedRouter(
            one.sizes,
            one.layer,
            one.rule,
            config.initializer_range,
            rngs,
            device_weight=one.device_weight,
            communication_weight=one.communication_weight,
        )
        for one in originals
    ]


def _pathway(originals: list[Any], config: MoEConfig, rngs: nnx.Rngs) -> list[ClassicRouter]:
    std = config.initializer_range
    if originals[0].hidden_weight is not None or originals[0].logit_std is not None:
        raise ValueError(
            "gate_layers = 2 and logit_std have no JAX twin; leave them out, or train with --backend torch"
        )
    return [PathwayRouter(one.sizes, one.layer, one.rule, std, rngs) for one in originals]


def _recurrent(originals: list[Any], config: MoEConfig, rngs: nnx.Rngs) -> list[ClassicRouter]:
    std, width = config.initializer_range, originals[0].projection.shape[0]
    cell = GRUCell(width, originals[0].rule, std, rngs)
    return [
        RecurrentRouter(one.sizes, one.layer, one.rule, std, rngs, cell=cell, width=width, recurrence=one.recurrence)
        for one in originals
    ]


def _pregate(originals: list[Any], config: MoEConfig, rngs: nnx.Rngs) -> list[PreGate]:
    ahead = originals[0].ahead
    owned = [block.own_gate for block in originals if block.own_gate is not None]
    planned = [block.pre_gate for block in originals if block.pre_gate is not None]
    gates = _twins([*owned, *planned], config, rngs)
    return [
        PreGate(
            layer,
            ahead,
            own_gate=gates[layer] if layer < ahead else None,
            pre_gate=gates[layer + ahead] if layer + ahead < len(gates) else None,
        )
        for layer in range(len(gates))
    ]


TWINS: dict[str, Callable[[list[Any], MoEConfig, nnx.Rngs], list[Any]]] = {
    "ClassicRouter": _classic,
    "DeviceBalancedRouter": _device_balanced,
    "PathwayRouter": _pathway,
    "RecurrentRouter": _recurrent,
    "PreGate": _pregate,
}
