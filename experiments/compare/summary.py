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
        unit: what one of the table is worth in the results.
    """

    label: str
    meaning: str
    digits: str
    unit: float = 1.0


METRICS: dict[str, Metric] = {
    "held_out_bits_per_byte": Metric(
        label="bits/byte", meaning="cross entropy on held-out text, lower is better", digits=".3f"
    ),
    "flops_per_token": Metric(
        label="MFLOP/token",
        meaning="operations of a forward pass with the loads that were measured: true experts, nulls, shared, router",
        digits=".4g",
        unit=1e6,
    ),
    "active_parameters": Metric(
        label="active Mparam",
        meaning="parameters without the experts that a token does not visit",
        digits=".4g",
        unit=1e6,
    ),
    "parameters": Metric(label="Mparam", meaning="all parameters, routers included", digits=".4g", unit=1e6),
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


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant, in the order of the results.

    Returns:
        `variant`, `seeds` (finished ones), `status` (what did not finish, or ""), `troubles` (the same with reasons),
        and per metric that the variant has its `mean`, `spread` (sample standard deviation; None with one seed) and
        `values`, in the units of the results.
    """
    variants = list(dict.fromkeys(result["variant"] for result in results))
    rows = []
    for variant in variants:
        own = [result for result in results if result["variant"] == variant]
        finished = [result for result in own if result["status"] == "finished"]
        troubled = [result for result in own if result["status"] != "finished"]
        rows.append(
            {
                "variant": variant,
                "seeds": len(finished),
                "status": ", ".join(_status(result) for result in troubled),
                "troubles": [f"{_status(result)}: {result['message']}" for result in troubled],
                "metrics": {
                    name: _spread(name, finished)
                    for name in METRICS
                    if finished and all(result[name] is not None for result in finished)
                },
            }
        )
    return rows


def cell(row: dict[str, Any], name: str) -> str:
    """A metric as `mean ± spread`, or the mean alone where seeds do not differ; "-" when no seed has it."""
    if name not in row["metrics"]:
        return "-"
    value, metric = row["metrics"][name], METRICS[name]
    mean = format(value["mean"] / metric.unit, metric.digits)
    if not value["spread"]:
        return mean
    # as many decimals as the mean shows, so that 1.750 is not followed by 0.00012
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {value['spread'] / metric.unit:.{decimals}f}"


def _status(result: dict[str, Any]) -> str:
    return f"seed {result['seed']} {result['status']}"


def _spread(name: str, finished: list[dict[str, Any]]) -> dict[str, Any]:
    values = [result[name] for result in finished]
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }
