"""What the commands print of plans with tiers, and the problem of a model's sizes alone."""

from pathlib import Path
from typing import Any

from rich.table import Table

from routing.ground.files import write_json
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from ..contract.plan import Plan
from ..tiers.memories import memory_rows

# how memories are named in rows, and in the sentence about all of them
_PLACES = {"GPU": "on GPU", "peer": "on peer GPUs", "host": "in RAM", "SSD": "on SSD"}


def print_tiers(plan: Plan, out: Path, json_file: Path | None) -> None:
    """Experts and bytes of every memory, the certificate, and one line with the totals."""
    console, rows = plain_console(), memory_rows(plan)
    table = Table("memory", "experts", "bytes", "of")
    for row in rows:
        table.add_row(row["memory"], str(row["experts"]), format_size(row["bytes"]), _room(row["room"]))
    if len(rows) > 3:
        console.print(table)
    totals = {place: [row for row in rows if row["memory"].startswith(place)] for place in _PLACES}
    held = ", ".join(
        f"{words} {sum(r['experts'] for r in totals[place])} ({format_size(sum(r['bytes'] for r in totals[place]))})"
        for place, words in _PLACES.items()
        if totals[place] or place != "peer"
    )
    per_token = plan.metadata.get("seconds_per_token")
    text = f"{per_token * 1e3:.3g} ms of expert reads per token expected" if per_token is not None else _steps(plan)
    console.print(f"wrote {out}: experts {held}; {text}", highlight=False)
    certificate = plan.certificate
    if certificate is not None:
        gap = "unknown" if certificate.gap is None else f"{certificate.gap:.3%}"
        console.print(
            f"certificate: {certificate.objective:.6g} s, bound {certificate.bound:.6g} s ({certificate.bound_basis}), "
            f"gap {gap}; {certificate.seconds:.1f} s",
            highlight=False,
        )
    if json_file:
        facts: dict[str, Any] = {} if certificate is None else certificate.to_json()
        facts.pop("dual", None)
        missing = dict.fromkeys(("balancedness", "gpu_fanout", "node_fanout"))
        write_json(json_file, {**facts, **missing, "memories": rows})


def score_plans_with_tiers(
    plans: dict[Path, Plan],
    trace: Path | None,
    loads: list[Path] | None,
    rows: str | None,
    objective: str | None,
    json_file: Path | None,
) -> None:
    """Judge plans with tiers on data, one row each; other plans and other objectives than seconds are refused."""
    from ..solving.tier_score import score_tiers
    from .inputs import read_problem

    if objective not in (None, "seconds"):
        raise ValueError(f"plans with tiers are judged by seconds; got --objective {objective}")
    if flat := [str(file) for file, plan in plans.items() if plan.homes is None]:
        raise ValueError(f"{flat[0]} has no tiers; score it apart from plans with tiers")
    table = Table("plan", "step, modelled", "bound", "gap", "step, replayed", "p95", "with a cache", "hit rate")
    reports = {}
    for file, plan in plans.items():
        found = score_tiers(read_problem(trace, loads, rows, plan.cluster, None, spare_slots=True), plan)
        reports[str(file)] = found.to_json()
        keys = ("at home: mean s", "at home: p95 s", "cached: mean s", "cached: hit rate")
        cells = [found.replayed.get(key) for key in keys]
        shown = ["-" if cell is None else f"{cell:.4g}" for cell in cells]
        table.add_row(file.name, f"{found.objective:.4g} s", f"{found.bound:.4g} s", f"{found.gap:.2%}", *shown)
    plain_console().print(table)
    if json_file:
        write_json(json_file, next(iter(reports.values())) if len(reports) == 1 else {"plans": reports})


def _steps(plan: Plan) -> str:
    steps = plan.metadata.get("seconds_per_step", {})
    return ", ".join(f"{name}: {seconds * 1e3:.4g} ms" for name, seconds in steps.items()) or "no data"


def _room(size: float | None) -> str:
    return "no limit" if size is None else format_size(size)
