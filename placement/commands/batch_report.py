"""Imbalance batch by batch, as `place score --batch-tokens` tells it."""

from pathlib import Path
from typing import Any

from rich.table import Table

from routing.ground.terminal import plain_console

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..objectives.batches import POLICIES, batch_imbalance


def judge_batches(plan: Plan, data: Problem, tokens: int, shared: int) -> dict[str, dict[str, Any]]:
    """Mean, 95th percentile and worst imbalance of batches, by the rule that chooses between copies.

    Args:
        plan: every expert on GPUs.
        data: its first scenario has the tokens.
        tokens: of one batch over all GPUs.
        shared: shared experts; 0 leaves the rows with filled GPUs out.

    Raises:
        ValueError: if the data are loads.
    """
    trace = data.scenarios[0].trace
    if trace is None:
        raise ValueError("--batch-tokens needs the tokens: a routing trace (--trace); loads are sums over batches")
    found = {policy: vars(batch_imbalance(plan, trace, tokens, policy, shared=shared)) for policy in POLICIES}
    if shared:
        filled = batch_imbalance(plan, trace, tokens, "lp", shared=shared, fills=True)
        found["lp, shared experts fill up"] = vars(filled)
    return found


def print_batches(plan: str, batches: dict[str, dict[str, Any]]) -> None:
    """One table: fullest over mean GPU of a batch, mean over layers."""
    table = Table("dispatch", "mean", "95 % of batches", "worst")
    for policy, value in batches.items():
        table.add_row(policy, *(f"{value[key]:.4g}" for key in ("mean", "p95", "worst")))
    count = next(iter(batches.values()))["batches"]
    console = plain_console()
    console.print(f"{Path(plan).name}: fullest over mean GPU in {count} batches", highlight=False)
    console.print(table)
