"""From runs to a table: what each column means, and its mean and spread over seeds."""

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One column.

    Args:
        label: its heading.
        meaning: one line for the legend.
        digits: of the mean, as a format specification.
    """

    label: str
    meaning: str
    digits: str


METRICS: dict[str, Metric] = {
    "held_out_bits_per_byte": Metric(
        label="bits/byte", meaning="cross entropy on held-out text, lower is better", digits=".3f"
    ),
    "flops_per_token": Metric(
        label="MFLOP/token",
        meaning="operations of a forward pass with the loads that were measured: true experts, nulls, shared, router",
        digits=".2f",
    ),
    "active_parameters": Metric(
        label="active Mparam", meaning="parameters without the experts that a token does not visit", digits=".2f"
    ),
    "parameters": Metric(label="Mparam", meaning="all parameters, routers included", digits=".2f"),
    "true_load": Metric(label="true load", meaning="FFN experts per token and layer", digits=".2f"),
    "max_vio": Metric(
        label="MaxVio", meaning="largest expert load over the mean, minus 1; 0 is balanced", digits=".2f"
    ),
    "dead_experts": Metric(label="dead", meaning="experts without a token, all layers", digits=".1f"),
    "router_entropy": Metric(label="entropy", meaning="of a token's router distribution, nats", digits=".2f"),
    "inner_balance": Metric(
        label="top1/top2", meaning="median ratio of the two best scores (inner balance)", digits=".2f"
    ),
    "outer_balance": Metric(
        label="top-K mass", meaning="summed probability of the K best (outer balance)", digits=".2f"
    ),
    "mutual_information": Metric(
        label="MI", meaning="nats that the first choice at a layer tells about the next layer's", digits=".2f"
    ),
    "predictability": Metric(
        label="foresight",
        meaning="share of a layer's experts that its router names from the previous layer's input; 1 = exact prefetch",
        digits=".2f",
    ),
    "lru_hit_rate": Metric(
        label="LRU 25 %", meaning="hit rate of a per-layer LRU cache of a quarter of the experts", digits=".3f"
    ),
    "srp": Metric(
        label="SRP",
        meaning="best F1 of one expert set per window of 16 tokens (segment routing performance)",
        digits=".3f",
    ),
    "active_hidden": Metric(
        label="active hidden", meaning="share of visited experts' hidden units that are not exactly 0", digits=".2f"
    ),
    "byte_coverage": Metric(
        label="byte coverage",
        meaning="how well the best single hidden unit tells each byte (mean F1), a proxy of interpretability",
        digits=".3f",
    ),
    "tokens_per_second": Metric(label="tok/s", meaning="training speed of the last step on this machine", digits=".0f"),
}
MILLIONS = {"flops_per_token", "active_parameters", "parameters"}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant, in the order of the results.

    Returns:
        `variant`, `seeds` (finished ones), `status` (what did not finish, or ""), and per metric that the variant has
        its `mean`, `spread` (sample standard deviation; None with one seed) and `values`.
    """
    variants = list(dict.fromkeys(result["variant"] for result in results))
    rows = []
    for variant in variants:
        own = [result for result in results if result["variant"] == variant]
        finished = [result for result in own if result["status"] == "finished"]
        troubled = [f"seed {result['seed']} {result['status']}" for result in own if result["status"] != "finished"]
        rows.append(
            {
                "variant": variant,
                "seeds": len(finished),
                "status": ", ".join(troubled),
                "metrics": {
                    name: _spread(name, finished)
                    for name in METRICS
                    if finished and all(result[name] is not None for result in finished)
                },
            }
        )
    return rows


def cell(row: dict[str, Any], name: str) -> str:
    """A metric as `mean ± spread`, or the mean alone with one seed; "-" when no seed has it."""
    if name not in row["metrics"]:
        return "-"
    value, digits = row["metrics"][name], METRICS[name].digits
    mean = format(value["mean"], digits)
    return mean if value["spread"] is None else f"{mean} ± {format(value['spread'], digits)}"


def _spread(name: str, finished: list[dict[str, Any]]) -> dict[str, Any]:
    values = [result[name] / (1e6 if name in MILLIONS else 1) for result in finished]
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }
