"""Prompt-routed pruning: do subnets that prompts choose beat one for all prompts, at the same share of operations?

Every way of pruning gets as many steps, and its subnets are tuned for as many steps in all: several share them. Single
subnets get the share of operations that routed prompts took, which need not be the budget.

Shapes: B sequences, S positions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..claim import Row, fit
from ..domains import BATCH, LENGTH, RATE, dense_model, held_out_rows, rows_of, tune

if TYPE_CHECKING:
    from torch import Tensor

DOMAINS = ("prose", "python", "tables", "markup")
LAYERS, BUDGET, CODES = 4, 0.6, 4
"""A code for each domain, if prompts part that way; the share is small enough that units compete. Not tuned."""
PROMPT = 16
"""Bytes that the router reads; the others are scored."""
PRUNING_RATE = 2e-2
"""Of codes and predictor; not tuned."""
POOL = 32
"""Batches of which each subnet takes the rows that its prompts are in."""
ROUTED, NO_TRANSPORT = "4 codes by prompt", "4 codes, no transport"
ONE_LEARNED, IMPORTANT = "1 code", "most important units"


def prompt_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte after the prompt, the share of operations, and how evenly prompts use the codes."""
    from moe import PromptPlan

    model = dense_model(96, seed, num_hidden_layers=LAYERS)
    tune(model, DOMAINS, 4 * steps, seed)
    model.requires_grad_(False)
    rows = [_row("the model", model, [_most_important(model, 1.0, seed)], None)]
    routed = _learned(ROUTED, model, PromptPlan(codes=CODES, budget=BUDGET), steps, seed)
    share = routed["share_of_operations"]
    alike = PromptPlan(codes=CODES, budget=BUDGET, transports=False)
    return [
        *rows,
        routed,
        _learned(NO_TRANSPORT, model, alike, steps, seed),
        _learned(ONE_LEARNED, model, PromptPlan(codes=1, budget=share), steps, seed),
        _row(IMPORTANT, model, [_most_important(model, share, seed)], None, steps, seed),
    ]


def _learned(name: str, model: Any, plan: Any, steps: int, seed: int) -> Row:
    pruner = _pruned(model, plan, steps, seed)
    return _row(name, model, [pruner.subnet(code) for code in range(plan.codes)], pruner.route, steps, seed)


def _pruned(model: Any, plan: Any, steps: int, seed: int) -> Any:
    from moe import PromptPruner

    pruner, draws = PromptPruner(model, plan, seed), np.random.default_rng(seed)
    fit(pruner.parameters(), lambda step: pruner.loss(rows_of(DOMAINS, draws), PROMPT), steps, PRUNING_RATE)
    return pruner.eval()


def _most_important(model: Any, share: float, seed: int) -> Any:
    """All layers, with equally many of their most important units, as near to a share of operations as that goes."""
    import torch

    from moe import kept_share, strongest, unit_importance

    draws = np.random.default_rng(seed)
    importance_LF = unit_importance(model, torch.cat([rows_of(DOMAINS, draws) for _ in range(8)]))
    choices = [strongest(importance_LF, range(LAYERS), width) for width in range(1, 1 + importance_LF.shape[1])]
    return min(choices, key=lambda subnet: abs(kept_share(model, subnet) - share))


def _row(name: str, model: Any, subnets: Sequence[Any], route: Any, steps: int = 0, seed: int = 0) -> Row:
    """Cut out, tuned on the rows of their own prompts, and judged on held-out rows of theirs."""
    import torch

    from moe import carve, kept_share

    def code_of(token_BS: "Tensor") -> "Tensor":
        return route(token_BS[:, :PROMPT]) if route else torch.zeros(len(token_BS), dtype=torch.long)

    draws = np.random.default_rng(seed + 1)
    pool = torch.cat([rows_of(DOMAINS, draws) for _ in range(POOL)])
    pool_code, models = code_of(pool), []
    for code, subnet in enumerate(subnets):
        cut, own = carve(model, subnet), pool[pool_code == code]
        if steps and len(own):
            _tune_on(cut, own, steps // len(subnets), seed)
        models.append(cut.eval())
    held_out = torch.cat([held_out_rows(domain) for domain in DOMAINS])
    code_B = code_of(held_out)
    bits = [_bits(models[code], held_out[code_B == code]) for code in code_B.unique().tolist()]
    shares = torch.tensor([kept_share(model, subnet) for subnet in subnets])
    used = torch.bincount(code_B, minlength=len(subnets)) / len(code_B)
    return {
        "variant": name,
        "bits_per_byte": float(torch.cat(bits).mean()),
        "share_of_operations": float(shares[code_B].mean()),
        "codes_used": float((-(used[used > 0] * used[used > 0].log()).sum()).exp()),
    }


def _tune_on(cut: Any, own: "Tensor", steps: int, seed: int) -> None:
    draws = np.random.default_rng(seed)

    def loss_of(step: int) -> "Tensor":
        token_BS = own[draws.integers(0, len(own), BATCH)]
        return cut(token_BS, labels=token_BS, use_cache=False).loss

    cut.requires_grad_(True).train()
    fit(cut.parameters(), loss_of, steps, RATE)


def _bits(cut: Any, token_BS: "Tensor") -> "Tensor":
    """Of every byte after the prompt of every row."""
    import torch

    with torch.no_grad():
        logits = cut(token_BS, use_cache=False).logits[:, PROMPT - 1 : LENGTH - 1]
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), token_BS[:, PROMPT:].flatten(), reduction="none"
    )
    return nats / float(np.log(2))
