"""One self-contained HTML page about a plan with tiers: what is where, what binds, what more hardware would bring."""

import html
from collections.abc import Sequence
from pathlib import Path

from routing.ground.quantity import format_size

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..solving.tier_score import TierScore, score_tiers
from ..solving.what_if import what_more_brings
from ..tiers.memories import memory_rows
from .page import line, write_page

FULL = 0.98  # of a memory's bytes: the next expert of most models would not fit


def write_tier_page(problem: Problem, plan: Plan, path: Path, other: Plan | None = None) -> None:
    """Write the page; it replaces an older one as a whole.

    Args:
        problem: the data that plans are judged on; its cluster is the plan's.
        plan: with homes.
        path: where the page goes.
        other: a second plan with homes for the same machines, judged beside it.

    Raises:
        ValueError: if a plan does not fit the data, or the plans are for other machines.
    """
    if other is not None and (other.homes is None or other.cluster.to_json() != plan.cluster.to_json()):
        raise ValueError("plans with tiers are compared where both have tiers and name the same machines")
    scores = {"this plan": score_tiers(problem, plan)}
    if other is not None:
        scores["other plan"] = score_tiers(problem, other)
    title = f"Experts over tiers: {plan.num_layers} layers, {plan.num_experts} experts, {plan.cluster.num_nodes} nodes"
    sections = [
        _certificate(plan),
        _steps(scores),
        _memories(plan),
        *([] if other is None else [_differences(plan, other)]),
    ]
    write_page(path, title, [*sections, _prices(plan), _more(problem, plan, scores["this plan"])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _certificate(plan: Plan) -> str:
    if (certificate := plan.certificate) is None or certificate.bound is None:
        return ""
    text = (
        f"On the planning data {certificate.objective:.4g} s, bound {certificate.bound:.4g} s "
        f"({certificate.bound_basis}), gap {certificate.gap:.3%}."
    )
    return f"<p>{html.escape(text)}</p>"


def _steps(scores: dict[str, TierScore]) -> str:
    """Seconds of each kind of step, modelled and replayed."""
    rows = [["modelled, weighted", *(f"{score.objective:.4g} s" for score in scores.values())]]
    rows.append(["bound of any plan for these machines", *(f"{score.bound:.4g} s" for score in scores.values())])
    first = next(iter(scores.values()))
    rows += [[f"modelled: {name}", *(f"{one.steps[name]:.4g} s" for one in scores.values())] for name in first.steps]
    rows += [
        [f"replayed, {name}", *(f"{one.replayed[name]:.4g}" for one in scores.values())] for name in first.replayed
    ]
    return f"<h2>Time of a step</h2>{_table(('', *scores), rows)}"


def _memories(plan: Plan) -> str:
    rows = []
    for row in memory_rows(plan):
        room = row["room"]
        limit, used = ("no limit", "") if not room else (format_size(room), f"{row['bytes'] / room:.1%}")
        note = "full" if room and row["bytes"] > FULL * room else ""
        rows.append((row["memory"], str(row["experts"]), format_size(row["bytes"]), limit, used, note))
    return f"<h2>What is where</h2>{_table(('memory', 'experts', 'bytes', 'of', 'used', ''), rows)}"


def _differences(plan: Plan, other: Plan) -> str:
    """Memories that hold other numbers of experts, and how many experts have another home."""
    rows = [
        (mine["memory"], str(mine["experts"]), str(theirs["experts"]))
        for mine, theirs in zip(memory_rows(plan), memory_rows(other), strict=True)
        if mine["experts"] != theirs["experts"]
    ]
    moved = sum(one != two for one, two in zip(_homes(plan), _homes(other), strict=True))
    table = _table(("memory", "experts, this plan", "experts, other plan"), rows) if rows else ""
    return f"<h2>Beside the other plan</h2>{table}<p>{moved} experts have another home there.</p>"


def _homes(plan: Plan) -> list[tuple[bytes, ...]]:
    """Where each expert of each layer is, to be compared."""
    assert plan.homes is not None
    tables = (plan.copies_LEG > 0, plan.homes.host_LEM, plan.homes.ssd_LEM)
    experts = ((layer, expert) for layer in range(plan.num_layers) for expert in range(plan.num_experts))
    return [tuple(table[layer, expert].tobytes() for table in tables) for layer, expert in experts]


def _prices(plan: Plan) -> str:
    """Memories by what their last byte is worth: the multipliers of the bound."""
    prices = {} if plan.certificate is None else plan.certificate.dual.get("bytes", {})
    binding = sorted(((price, name) for name, price in prices.items() if price > 0), reverse=True)
    if not binding:
        return "<h2>What binds</h2><p>No memory has a price in the certificate: none binds.</p>"
    rows = [(name, f"{1e6 * price * (1 << 30):.4g}") for price, name in binding]
    text = (
        "Prices from the certificate, so for the planning data: one GiB more lowers the bound of a step by at most so "
        "much. Memories that are not named do not bind."
    )
    return f"<h2>What binds</h2>{_table(('memory', 'µs per GiB'), rows)}<p>{text}</p>"


def _more(problem: Problem, plan: Plan, score: TierScore) -> str:
    rows = [
        (one.change, f"{one.seconds:.4g} s", f"{1 - one.seconds / score.objective:.1%}", f"{one.bound:.4g} s")
        for one in what_more_brings(problem, plan)
    ]
    text = "Each change is solved anew by search on this data, so a part of the gain may be the search's own."
    head = ("change", "step", "gain over this plan", "bound")
    return f"<h2>What more hardware would bring</h2>{_table(head, rows)}<p>{html.escape(text)}</p>"
