"""From runs to a table: what each column means, and its mean and spread over seeds."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..judging.equivalence import Equivalence, effect_size, equivalence, mean_interval

JUDGED = "held_out_bits_per_byte"
"""The metric that verdicts are about."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One column.

    Args:
        label: its heading.
        meaning: one line for the legend.
        digits: of the mean, as a format specification.
        unit: what one of the table is worth in the results.
        better: `lower` or `higher`; None where neither is.
    """

    label: str
    meaning: str
    digits: str
    unit: float = 1.0
    better: Literal["lower", "higher"] | None = None

    @property
    def heading(self) -> str:
        """The label, with an arrow to where it is better."""
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[self.better]
        return self.label + arrow


# numbers in the rows are digits and units of the table
METRICS: dict[str, Metric] = {
    "held_out_bits_per_byte": Metric(
        label="bits/byte", meaning="cross entropy on held-out text", digits=".3f", better="lower"
    ),
    "flops_per_token": Metric(
        label="MFLOP/token",
        meaning="operations of a forward pass with the loads that were measured: true experts, nulls, shared, router",
        digits=".4g",
        unit=1e6,
        better="lower",
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
        label="MaxVio",
        meaning="largest expert load over the mean, minus 1; 0 is balanced",
        digits=".2f",
        better="lower",
    ),
    "dead_experts": Metric(label="dead", meaning="experts without a token, all layers", digits=".1f", better="lower"),
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
        better="higher",
    ),
    "lru_hit_rate": Metric(
        label="LRU 25 %",
        meaning="hit rate of a per-layer LRU cache of a quarter of the experts",
        digits=".3f",
        better="higher",
    ),
    "srp": Metric(
        label="SRP",
        meaning="best F1 of one expert set per window of 16 tokens (segment routing performance)",
        digits=".3f",
        better="higher",
    ),
    "active_hidden": Metric(
        label="active hidden", meaning="share of visited experts' hidden units that are not exactly 0", digits=".2f"
    ),
    "byte_coverage": Metric(
        label="byte coverage",
        meaning="how well the best single hidden unit tells each byte (mean F1), a proxy of interpretability",
        digits=".3f",
        better="higher",
    ),
    "cloze": Metric(
        label="cloze",
        meaning="share of held-out passages whose continuation is told from three others; chance is 0.25",
        digits=".2f",
        better="higher",
    ),
    "copying": Metric(
        label="copying",
        meaning="share of a passage's tokens that are predicted when it comes again, less the share the first time",
        digits=".2f",
        better="higher",
    ),
    "tokens_per_second": Metric(
        label="tok/s", meaning="training speed of the last step on this machine", digits=".0f", better="higher"
    ),
}


def summarise(results: list[dict[str, Any]], margin: float | None = None) -> list[dict[str, Any]]:
    """One row per variant, in the order of the results.

    Args:
        results: one per run, as `execute_one` gives them.
        margin: bits per byte within which two variants count as equal; None for no test of that.

    Returns:
        `variant`, `seeds` (finished ones), `status` (what did not finish, or ""), `troubles` (the same with reasons),
        per metric that the variant has its `mean`, `spread` (sample standard deviation; None with one seed) and
        `values`, in the units of the results, and `difference` to the first variant, as `difference_to` gives it.
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
                    if finished and all(result.get(name) is not None for result in finished)
                },
                "difference": difference_to([r for r in results if r["variant"] == variants[0]], own, margin),
            }
        )
    return rows


def difference_to(
    first: list[dict[str, Any]], own: list[dict[str, Any]], margin: float | None = None
) -> dict[str, Any] | None:
    """How much worse a variant is than the first one in bits per byte, over the seeds that both have finished.

    Seeds are paired: both runs of a seed see the same batches in the same order.

    Args:
        first, own: results of the first variant and of this one.
        margin: bits per byte within which both count as equal; None for no test of that.

    Returns:
        `mean`, the ends `low` and `high` of its 95 % interval (Student's t; None with one seed), `seeds`, `effect`
        (Hedges' g with its interval, or None), `equivalence` (two one-sided tests, or None) and the `verdict`; None for
        the first variant itself, or without a common seed.
    """
    values = [
        {result["seed"]: result[JUDGED] for result in results if result["status"] == "finished"}
        for results in (first, own)
    ]
    seeds = sorted(set(values[0]) & set(values[1]))
    if first == own or not seeds:
        return None
    gaps = [values[1][seed] - values[0][seed] for seed in seeds]
    low, high = mean_interval(gaps) or (None, None)
    effect, equal = effect_size(gaps), None if margin is None else equivalence(gaps, margin)
    return {
        "mean": statistics.fmean(gaps),
        "low": low,
        "high": high,
        "seeds": len(seeds),
        "effect": None if effect is None else asdict(effect),
        "equivalence": None if equal is None else asdict(equal) | {"is_shown": equal.is_shown},
        "verdict": _verdict(low, high, equal),
    }


def _verdict(low: float | None, high: float | None, equal: Equivalence | None) -> str:
    if low is None or high is None:
        return "one seed: no verdict"
    is_equal = equal is not None and equal.is_shown
    if high < 0:
        return "better, within the margin" if is_equal else "better"
    if low > 0:
        return "worse, within the margin" if is_equal else "worse"
    return "equivalent" if is_equal else "no difference shown"


def difference_cell(row: dict[str, Any]) -> tuple[str, str, str]:
    """The difference to the first variant with its interval, the effect size with its own, and the verdict, as text."""
    found = row["difference"]
    if found is None:
        return "-", "-", "-"
    reach = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    effect = found["effect"]
    size = "-" if effect is None else f"{effect['value']:+.1f} [{effect['low']:+.1f}, {effect['high']:+.1f}]"
    return f"{found['mean']:+.3f}{reach}", size, found["verdict"]


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
