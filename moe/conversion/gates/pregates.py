"""Pre-gates distilled from ordinary gates: what a later layer's gate will say, predicted from an earlier layer.

Shapes: T tokens, D model width, R routable experts, K experts per token, L MoE layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..source import OurSource
from .regated import (
    changed_config,
    dtype_of,
    gate_name,
    loss_on,
    own_gates,
    rows_of,
    softmax_rule,
    streamed,
    write_regated,
)

HELD_OUT = 10
"""One row of so many is kept out of the regression, to say how good it is."""


@dataclass(frozen=True, kw_only=True)
class PreGatePlan:
    """Which pre-gates to fit.

    Args:
        fit: a text; the hidden states on it are what gates are fitted to.
        ahead: layers from where a gate is read to the layer that it decides for, 1..L-1.
        ridge: added to the diagonal of the second moments, in units of its mean; at least 0.
        data: a text to score before and after, or None.
        tokens: of each text, at most.
    """

    fit: Path
    ahead: int = 1
    ridge: float = 1e-4
    data: Path | None = None
    tokens: int = 4096


def add_pregates(
    folder: Path, out: Path, plan: PreGatePlan, advance: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write a pre-gated model of ours: gates of layers from `ahead` on are read `ahead` layers earlier.

    Args:
        folder: a checkpoint of ours or an `olmoe`, `qwen3_moe` or `mixtral` one, with plain softmax routers.
        out: folder to write; appears whole or not at all.
        plan: texts and distance.
        advance: is told how many bytes are written, of how many.

    Returns:
        Per fitted gate the share of the ordinary gate's choices that it names on held-out rows, and that of the
        logits' variance it explains; losses if there is a text.

    Raises:
        ValueError: if the routers are others, or the distance leaves no layer.

    Source: Hwang et al. 2023 (Pre-gated MoE), arXiv:2308.12066, section 4.1, for the model; they train its gates.
        Ridge regression: Hoerl and Kennard 1970.
    """
    source = OurSource(folder)
    softmax_rule(source)
    config, L = source.config, source.config.num_moe_layers
    if not 1 <= plan.ahead < L:
        raise ValueError(f"ahead must lie in 1..{L - 1} (MoE layers - 1); got {plan.ahead}")
    if plan.ridge < 0:
        raise ValueError(f"ridge must not be negative; got {plan.ridge:g}")
    after = changed_config(
        source,
        {
            "router": "pregate",
            "router_options": {
                "ahead": plan.ahead,
                "inner": config.router,
                "inner_options": config.router_options,
            },
        },
    )
    ordinary = own_gates(source)
    fitted, facts = _fit(source, ordinary, rows_of(source, plan.fit, plan.tokens), plan)
    gates = {gate_name(config, b, "own_gate.weight"): ordinary[gate_name(config, b)] for b in range(plan.ahead)}
    gates |= {gate_name(config, b - plan.ahead, "pre_gate.weight"): weight_RD for b, weight_RD in fitted.items()}
    report: dict[str, Any] = {"ahead": plan.ahead, "layers": facts}
    report["agreement"] = sum(layer["agreement"] for layer in facts) / len(facts)
    if plan.data is not None:
        token_BS = rows_of(source, plan.data, plan.tokens)
        report["loss_before"] = loss_on(source, config, ordinary, token_BS)
        report["loss_after"] = loss_on(source, after, gates, token_BS)
    write_regated(source, after, gates, out, advance)
    return report


@torch.no_grad()
def _fit(
    source: OurSource, ordinary: dict[str, Tensor], token_BS: Tensor, plan: PreGatePlan
) -> tuple[dict[int, Tensor], list[dict[str, Any]]]:
    """One pass of the model over the text; each layer's gate, fitted to the inputs of the layer `ahead` before it."""
    if len(token_BS) < 2:
        raise ValueError("the text to fit on holds one row of tokens; give a longer one, or more --tokens")
    num_held = max(1, len(token_BS) // HELD_OUT) * token_BS.shape[1]
    earlier: dict[int, Tensor] = {}
    fitted: dict[int, Tensor] = {}
    facts: list[dict[str, Any]] = []

    def see(layer: int, x_TD: Tensor) -> None:
        earlier[layer] = x_TD.double()
        if layer < plan.ahead:
            return
        weight_RD = ordinary[gate_name(source.config, layer)].double()
        logit_TR = centred(earlier[layer] @ weight_RD.T)
        input_TD = earlier.pop(layer - plan.ahead)
        found_RD = regression(input_TD[:-num_held], logit_TR[:-num_held], plan.ridge)
        fitted[layer] = found_RD.to(dtype_of(source))
        predicted_TR = input_TD[-num_held:] @ found_RD.T
        facts.append({"layer": layer, **quality(predicted_TR, logit_TR[-num_held:], source.config.num_experts_per_tok)})

    with streamed(source, source.config, ordinary, see) as model:
        model.model(token_BS, use_cache=False)
    return fitted, facts


def centred(logit_TR: Tensor) -> Tensor:
    """Logits less their mean over a token's experts, which no softmax sees and no gate need predict."""
    return logit_TR - logit_TR.mean(dim=-1, keepdim=True)


def regression(input_TD: Tensor, target_TR: Tensor, ridge: float) -> Tensor:
    """The weight [R, D] with the least sum of squared errors plus `ridge` times its own square, in units of the inputs'
    mean square; of several that do equally well the shortest."""
    moment_DD = input_TD.T @ input_TD
    moment_DD.diagonal().add_(ridge * moment_DD.diagonal().mean())
    return torch.linalg.lstsq(moment_DD, input_TD.T @ target_TR, driver="gelsd").solution.T


def quality(predicted_TR: Tensor, logit_TR: Tensor, top_k: int) -> dict[str, float]:
    """Share of the true K best that are among the predicted K best; share of the logits' variance that is explained."""
    chosen_TR, true_TR = (_is_best(one, top_k) for one in (predicted_TR, logit_TR))
    error = (predicted_TR - logit_TR).square().sum()
    spread = (logit_TR - logit_TR.mean(dim=0)).square().sum()
    return {
        "agreement": float((chosen_TR & true_TR).sum() / true_TR.sum()),
        "explained_variance": float(1 - error / spread.clamp_min(torch.finfo(torch.float64).tiny)),
    }


def _is_best(logit_TR: Tensor, top_k: int) -> Tensor:
    return torch.zeros_like(logit_TR, dtype=torch.bool).scatter(1, logit_TR.topk(top_k, dim=-1).indices, True)
