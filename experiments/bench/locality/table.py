"""From runs and their measures to one row per variant, with intervals, and the pair of claims in tension."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ...compare.summary import JUDGED, difference_to
from ...judging.equivalence import mean_interval
from ...variants.locality import BY_LOSS, CONSTRAINED

POLICIES = ("lru", "learned", "belady")
COLUMNS = (
    *(JUDGED, "adjacent_reuse"),
    *(f"{policy}_{share}" for policy in POLICIES for share in ("12.5", "25", "50")),
    *("srp", "sch", "gpu_fanout"),
    *(f"{name}_{share}" for share in ("12.5", "25") for name in ("reads", "tokens_per_second")),
)


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant.

    Args:
        results: one per run that has ended: `variant`, `seed`, `status`, and the columns of those that finished.

    Returns:
        `variant`, `seeds`, per column `mean`, `low`, `high` (95 %, Student's t; None with one seed) and `values`, and
        the paired `difference` of bits per byte from the first variant.
    """
    names = list(dict.fromkeys(result["variant"] for result in results))
    by_name = {name: [result for result in results if result["variant"] == name] for name in names}
    rows = []
    for name, own in by_name.items():
        finished = [result for result in own if result["status"] == "finished"]
        columns = {column: _interval([result[column] for result in finished]) for column in COLUMNS if finished}
        difference = difference_to(by_name[names[0]], own)
        rows.append({"variant": name, "seeds": len(finished), "columns": columns, "difference": difference})
    return rows


def claims_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A constraint against each loss: bits per byte (constraint minus loss, paired by seed) beside both hit rates.

    The published claims: avoiding swaps by a loss costs quality, a constraint that is trained in hardly does.
    """
    found = []
    for constrained in CONSTRAINED:
        for by_loss in BY_LOSS:
            ours, theirs = ([r for r in results if r["variant"] == name] for name in (constrained, by_loss))
            difference = difference_to(theirs, ours) if ours and theirs else None
            if difference is not None:
                rates = {name: _mean(own, "lru_25") for name, own in (("constraint", ours), ("loss", theirs))}
                pair = {"constraint": constrained, "loss": by_loss}
                found.append(pair | {"difference": difference, "lru_25": rates})
    return found


def tables_of(rows: list[dict[str, Any]]) -> list[Table]:
    """The rows for a terminal, in tables of at most five columns."""
    shares = ("12.5", "25", "50")
    groups = [{JUDGED: "bits/byte", "adjacent_reuse": "reuse", "srp": "SRP", "sch": "SCH", "gpu_fanout": "GPU fan-out"}]
    groups += [{f"{policy}_{share}": f"{policy} {share} %" for share in shares} for policy in POLICIES]
    groups += [
        {f"reads_{share}": f"reads {share} %" for share in shares[:2]}
        | {f"tokens_per_second_{share}": f"tok/s {share} %" for share in shares[:2]}
    ]
    tables = []
    for labels in groups:
        table = Table("variant", *labels.values())
        for row in rows:
            table.add_row(row["variant"], *(_cell(row["columns"].get(name)) for name in labels))
        tables.append(table)
    return tables


def claims_table(claims: list[dict[str, Any]]) -> Table:
    """The pairs of a constraint and a loss."""
    table = Table("constraint", "loss", "bits/byte, constraint - loss", "LRU 25 %", title="the claims in tension")
    for claim in claims:
        gap, rates = claim["difference"], claim["lru_25"]
        reach = "" if gap["low"] is None else f" [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        table.add_row(
            claim["constraint"],
            claim["loss"],
            f"{gap['mean']:+.3f}{reach}: {gap['verdict']}",
            f"{rates['constraint']:.3f} against {rates['loss']:.3f}",
        )
    return table


def _mean(results: Sequence[dict[str, Any]], column: str) -> float:
    return statistics.fmean(result[column] for result in results if result["status"] == "finished")


def _interval(values: list[float | None]) -> dict[str, Any] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    low, high = mean_interval(numbers) or (None, None)
    return {"mean": statistics.fmean(numbers), "low": low, "high": high, "values": numbers}


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.3f}" + ("" if found["low"] is None else f" ± {found['high'] - found['mean']:.3f}")
