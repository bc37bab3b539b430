"""Variants that are trained so that tokens reuse experts: by a constraint on the choice, or by a loss."""

from collections.abc import Callable
from typing import Any

from routing import ROUTERS

Settings = dict[str, Any]
REUSE_WEIGHT = 0.05
"""Of each reuse loss in training from scratch: a few per cent of the language-model loss. Our choice; a run's
`reuse_loss_weight` replaces it."""


def _resident(share: int, **options: Any) -> Callable[[Settings], Settings]:
    """E / share residents, and at least K; one fewer where swaps serve the next token, for which a slot is kept."""

    def build(model: Settings) -> Settings:
        num_experts, top_k = model.get("num_experts", 16), model.get("num_experts_per_tok", 2)
        spare = 1 if options.get("admits") == "next" else 0
        residents = max(top_k, num_experts // share - spare)
        return {"router": "resident", "router_options": {"residents": residents, **options}}

    return build


def _pregated_resident(model: Settings) -> Settings:
    """A quarter of the experts are residents, and each gate is read one block early."""
    inner = _resident(4)(model)
    options = {"ahead": 1, "inner": "resident", "inner_options": inner["router_options"]}
    return {"router": "pregate", "router_options": options}


def _loss(name: str) -> Callable[[Settings], Settings]:
    """The router of the baseline `olmoe` with a reuse loss."""
    return lambda model: {"router": "olmoe", "reuse_loss": name, "reuse_loss_weight": REUSE_WEIGHT}


def _pool(model: Settings) -> Settings:
    return {"router": "pool", "balance_loss_weight": ROUTERS["pool"].balance_weight}


# numbers are the share of the experts that are residents: an eighth, a quarter
CONSTRAINED: dict[str, Callable[[Settings], Settings]] = {
    "resident-8th": _resident(8),
    "resident-4th": _resident(4),
    "resident-4th-better": _resident(4, swaps="better"),
    "resident-4th-next": _resident(4, admits="next"),
    "pregate-resident": _pregated_resident,
    "pool": _pool,
}
BY_LOSS: dict[str, Callable[[Settings], Settings]] = {
    "reuse-replaced-l1": _loss("replaced_l1"),
    "reuse-l2": _loss("l2"),
    "reuse-overlap": _loss("overlap"),
    "reuse-recent-use": _loss("recent_use"),
}
LOCALITY_VARIANTS = CONSTRAINED | BY_LOSS
ORDINARY = ("olmoe", "top2", "loss-free", "deepseek-v3", "sigma-moe", "rmoe", "pregate-1")
"""What locality variants are compared with; the first is the baseline."""
