"""VARIANTS: what `expertier compare` compares: a router with the experts, top-k and options that go with it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from moe import ARCHITECTURES
from routing import ROUTERS
from routing.ground.expect import expect_name

from .architectures import ARCHITECTURE_VARIANTS
from .locality import LOCALITY_VARIANTS

Settings = dict[str, Any]
# tau, the load of an FFN expert for that of a zero-compute one: the default of the router `moepp`
MOEPP_FFN_SHARE = 0.75


def _sizes(model: Settings) -> tuple[int, int]:
    """E and K."""
    return model.get("num_experts", 16), model.get("num_experts_per_tok", 2)


def _nulls(num: int, top_k: int, **changes: Any) -> Callable[[Settings], Settings]:
    """AdaMoE with E * num / 16 null experts, so that its expected load is the same share of any preset's E.

    The balance coefficient is the paper's first-phase 0.02, whose load shares sum to K where ours sum to 1.
    """

    def build(model: Settings) -> Settings:
        nulls = max(1, _sizes(model)[0] * num // 16)
        own = {"router": "adamoe", "zero_compute_experts": ["zero"] * nulls, "num_experts_per_tok": top_k}
        return own | {"balance_loss_weight": 0.02 * top_k} | changes

    return build


def _longcat(model: Settings) -> Settings:
    """Half as many copy experts as FFN experts, one more choice, true load steered to 3/4 of the base."""
    num_experts, base_k = _sizes(model)
    return {
        "router": "longcat",
        "router_options": {"target_load": 0.75 * base_k},
        "zero_compute_experts": ["copy"] * max(1, num_experts // 2),
        "num_experts_per_tok": base_k + 1,
    }


def _moepp(model: Settings) -> Settings:
    """One zero, one copy and E/4 - 2 constant experts, as published.

    The paper's balance coefficient is 0.01 for a loss without the factor R and with load shares that sum to K; ours is
    1 at its target.
    """
    num_experts, base_k = _sizes(model)
    kinds = ["zero", "copy"] + ["constant"] * max(num_experts // 4 - 2, 1)
    weight = 0.01 * base_k * MOEPP_FFN_SHARE / (MOEPP_FFN_SHARE * num_experts + len(kinds))
    return {"router": "moepp", "zero_compute_experts": kinds, "balance_loss_weight": weight}


def _deepseek_v2(model: Settings) -> Settings:
    """Eight devices, three per token as published, with all three losses; fewer devices if there are fewer experts."""
    num_experts, base_k = _sizes(model)
    num_groups = min(8, num_experts)
    options = {"num_groups": num_groups, "groups_kept": min(max(3, base_k), num_groups)}
    return {"router": "deepseek_v2", "router_options": options} | _coefficient("deepseek_v2")


def _recurrent(model: Settings, **options: Any) -> Settings:
    """RMoE with a state as wide, for the model's width, as published: 128 of 352."""
    width = max(8, round(model.get("hidden_size", 256) * 128 / 352 / 8) * 8)
    return {"router": "rmoe", "router_options": {"state_width": width, **options}}


def _pregated_recurrent(model: Settings) -> Settings:
    """The same RMoE, read one block early."""
    inner = _recurrent(model)["router_options"]
    return {"router": "pregate", "router_options": {"ahead": 1, "inner": "rmoe", "inner_options": inner}}


def _router(name: str, **options: Any) -> Callable[[Settings], Settings]:
    """A router with the preset's own experts, and the balance coefficient of its row in `ROUTERS` if it gives one."""
    own: Settings = {"router": name, "router_options": options} | _coefficient(name)
    return lambda model: own


def _coefficient(name: str) -> Settings:
    """The published balance coefficient of a router."""
    weight = ROUTERS[name].balance_weight
    return {} if weight is None else {"balance_loss_weight": weight}


# AdaMoE has 16 null experts per 16 true ones, and the number in its name is the true experts that K = 4 or 3 expects;
# `ahead` is how many layers a pre-gate looks forward
VARIANTS: dict[str, Callable[[Settings], Settings]] = {
    "top2": _router("mixtral"),
    "adamoe-2.0": _nulls(16, 4),
    "adamoe-1.5": _nulls(16, 3),
    "adamoe-1.5-per-null": _nulls(16, 3, router_options={"balance_loss": "switch"}),
    "adamoe-1.5-over-all": _nulls(16, 3, router_options={"normalise_over": "selected"}),
    "longcat-nulls": _longcat,
    "moe++": _moepp,
    "rmoe": _recurrent,
    "rmoe-np": partial(_recurrent, recurrence="none"),
    "rmoe-kaiming": partial(_recurrent, init="kaiming"),
    "rmoe-np-kaiming": partial(_recurrent, init="kaiming", recurrence="none"),
    "rmoe-detach": partial(_recurrent, recurrence="detach"),
    "pregate-1": _router("pregate", ahead=1),
    "pregate-2": _router("pregate", ahead=2),
    "pregate-3": _router("pregate", ahead=3),
    "pregate-rmoe": _pregated_recurrent,
    "loss-free": _router("loss_free"),
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _router("deepseek_v3"),
    "sigma-moe": _router("sigma_moe"),
    "remoe": _router("remoe"),
    "expert-choice": _router("expert_choice"),
}


def model_overrides(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """The model settings of a variant.

    Args:
        name: a key of `VARIANTS`, `ARCHITECTURE_VARIANTS` or `LOCALITY_VARIANTS`; of `routing.ROUTERS` for that router
            with the preset's own experts; or of `moe.ARCHITECTURES` for that architecture with its default options.
        model: the preset's settings.

    Raises:
        ValueError: if there is no such variant, router or architecture.
    """
    expect_variant(name)
    if name in VARIANTS:
        return model | VARIANTS[name](model)
    for variants in (ARCHITECTURE_VARIANTS, LOCALITY_VARIANTS):
        if name in variants:
            return model | variants[name](model)
    if name in ROUTERS:
        return model | {"router": name} | _coefficient(name)
    return model | {"architecture": name}


def expect_variant(name: str) -> None:
    """Raises ValueError, with the nearest name, if there is no such variant, router or architecture."""
    names = {*VARIANTS, *ARCHITECTURE_VARIANTS, *LOCALITY_VARIANTS, *ROUTERS, *ARCHITECTURES}
    expect_name(name, names, "variant, router or architecture")
