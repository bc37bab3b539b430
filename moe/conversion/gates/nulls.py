"""Null experts for a trained mixture of experts, with its first loss unchanged: AdaMoE's own setting.

Shapes: E experts, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..source import OurSource
from .regated import changed_config, loss_on, own_gates, rows_of, softmax_rule, write_regated

NULL_LOSS = 0.02
"""Coefficient of the balance loss in the first, tight epoch, for load shares that sum to K."""


@dataclass(frozen=True, kw_only=True)
class NullPlan:
    """Which null experts to add.

    Args:
        nulls: Z, a multiple of E: every FFN row of the router is copied Z / E times; None takes E.
        top_k: choices per token, nulls among them; None takes K (1 + Z / E).
        data: a text to score before and after, or None.
        tokens: of the text, at most.
    """

    nulls: int | None = None
    top_k: int | None = None
    data: Path | None = None
    tokens: int = 4096


def add_nulls(
    folder: Path, out: Path, plan: NullPlan, advance: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write a model of ours with null experts whose router rows are copies of the FFN experts' rows.

    An FFN row and its c = Z / E copies score alike, so the K' best choices are the best K FFN experts with their
    copies if K' = K (1 + c), whatever is done with ties. With K' from (K - 1)(1 + c) + 1 on they still are the best K
    where ties go to the lower id, as on a CPU. Weights count FFN experts only, so the model computes what it did.

    Args:
        folder: a checkpoint of ours or an `olmoe`, `qwen3_moe` or `mixtral` one, with plain softmax routers.
        out: folder to write; appears whole or not at all.
        plan: how many nulls and choices.
        advance: is told how many bytes are written, of how many.

    Returns:
        Sizes, the load at the start and when balanced, whether the first loss is unchanged, losses if there is a text.

    Raises:
        ValueError: if the routers are others, or the numbers do not fit.

    Source: Zeng et al. 2024 (AdaMoE), arXiv:2406.13233, section 3.2; their (8, 3) and (16, 4) on Mixtral are of the
        second kind.
    """
    source = OurSource(folder)
    rule, config = softmax_rule(source), source.config
    E, K = config.num_experts, config.num_experts_per_tok
    Z = E if plan.nulls is None else plan.nulls
    if Z < 1 or Z % E:
        raise ValueError(f"nulls start as copies of the {E} experts' router rows; give a multiple of {E}, got {Z}")
    copies = Z // E
    top_k = K * (1 + copies) if plan.top_k is None else plan.top_k
    if not K <= top_k <= E + Z:
        raise ValueError(f"choices per token must lie in {K}..{E + Z} (K..E+Z); got {top_k}")
    scoring = {"score": "softmax", "scale": rule.scoring.scale * (1 + copies), "balance_loss": "null_averaged"}
    is_normalised = rule.scoring.is_normalised
    after = changed_config(
        source,
        {
            "zero_compute_experts": ["zero"] * Z,
            "num_experts_per_tok": top_k,
            "router": "adamoe" if is_normalised else "classic",
            "router_options": {"scale": rule.scoring.scale} if is_normalised else scoring,
            "balance_loss_weight": NULL_LOSS * top_k,
        },
    )
    before_gates = own_gates(source)
    gates = {name: torch.cat([weight_ED] * (1 + copies)) for name, weight_ED in before_gates.items()}
    first_exact = (K - 1) * (1 + copies) + 1
    report: dict[str, Any] = {
        "num_experts": E,
        "nulls": Z,
        "num_experts_per_tok": top_k,
        "balanced_load": E * top_k / (E + Z),
        "first_loss_unchanged": top_k == K * (1 + copies),
        "first_loss_unchanged_on_cpu": first_exact <= top_k <= K * (1 + copies),
    }
    if plan.data is not None:
        token_BS = rows_of(source, plan.data, plan.tokens)
        report["loss_before"] = loss_on(source, config, before_gates, token_BS)
        report["loss_after"] = loss_on(source, after, gates, token_BS)
    write_regated(source, after, gates, out, advance)
    return report
