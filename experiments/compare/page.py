"""The page of a comparison: table, figures, legend, in one self-contained HTML file."""

import html
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from routing.ground.files import atomic_write

from ..evidence.figures import ACCENT, INK, SOFT, inline_svg
from .summary import METRICS, cell

PANELS = (
    "held_out_bits_per_byte",
    "flops_per_token",
    "true_load",
    "max_vio",
    "dead_experts",
    "router_entropy",
    "inner_balance",
    "outer_balance",
    "mutual_information",
    "predictability",
    "lru_hit_rate",
    "srp",
)
PANELS_IN_A_ROW = 4
FROM_ZERO = set(PANELS) - {"held_out_bits_per_byte", "inner_balance"}
# from this ratio of its largest to its smallest value on, a panel without zero is logarithmic
LOGARITHMIC_FROM = 10
LINES = ("-", "--", ":")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1400px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:12px}
.wide{overflow-x:auto} th,td{padding:.25rem .35rem;text-align:right;border-bottom:1px solid #e4e7eb}
td{white-space:nowrap} th{vertical-align:bottom;line-height:1.2}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
svg{max-width:100%;height:auto} .trouble{color:#c92a2a}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem} dt{font-weight:600} dd{margin:0}
"""


def write_page(
    path: Path, rows: list[dict[str, Any]], curves: dict[str, list[list[tuple[int, float]]]], facts: str
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        rows: from `summarise`.
        curves: per variant and seed, (step, training bits per byte).
        facts: one paragraph on preset, text, steps and seeds.
    """
    finished = [row for row in rows if row["metrics"]]
    figures = [trade_off(finished), panels(finished)] if finished else []
    if any(points for seeds in curves.values() for points in seeds):
        figures.append(learning_curves(curves))
    body = [
        "<h1>Routers compared</h1>",
        f"<p>{html.escape(facts)}</p>",
        f'<div class="wide">{_table(rows)}</div>',
        *(f'<p class="trouble">{html.escape(trouble)}</p>' for trouble in _troubles(rows)),
        *(inline_svg(figure) for figure in figures),
        "<h2>Columns</h2><dl>",
        *(f"<dt>{html.escape(m.label)}</dt><dd>{html.escape(m.meaning)}</dd>" for m in METRICS.values()),
        "</dl>",
    ]
    plt.close("all")
    with atomic_write(path) as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Routers compared</title>'
            f"<style>{STYLE}</style>{''.join(body)}</html>"
        )


def trade_off(rows: list[dict[str, Any]]) -> Figure:
    """Bits per byte against operations per token, with the spread over seeds."""
    figure, axes = plt.subplots(figsize=(9, 4.6))
    for row in rows:
        x, y = (_in_units(row, name) for name in ("flops_per_token", "held_out_bits_per_byte"))
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=x["spread"],
            yerr=y["spread"],
            fmt="o",
            color=ACCENT,
            ecolor=SOFT,
            ms=5,
            capsize=2,
        )
    _label_apart(axes, rows)
    axes.set(xlabel="MFLOP per token, forward", ylabel="bits per byte on held-out text")
    axes.margins(x=0.12, y=0.1)
    _bare(axes)
    return figure


def panels(rows: list[dict[str, Any]]) -> Figure:
    """One panel per metric: means as bars where zero means something, as ticks elsewhere; seeds as dots."""
    names = [row["variant"] for row in rows]
    num_rows = -(-len(PANELS) // PANELS_IN_A_ROW)
    size = (12, num_rows * max(2.2, 0.22 * len(names) + 0.8))
    figure, grid = plt.subplots(num_rows, PANELS_IN_A_ROW, figsize=size, sharey=True, layout="constrained")
    for axes, metric in zip(grid.flat, PANELS, strict=True):
        for place, row in enumerate(rows):
            if metric in row["metrics"]:
                _draw_value(axes, place, _in_units(row, metric), from_zero=metric in FROM_ZERO)
        axes.set_title(METRICS[metric].label, fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(axis="y", color=SOFT, lw=0.3)
        _scale(axes, metric, [row["metrics"][metric]["mean"] for row in rows if metric in row["metrics"]])
        _bare(axes)
    grid.flat[0].invert_yaxis()
    return figure


def _draw_value(axes: Any, place: int, value: dict[str, Any], *, from_zero: bool) -> None:
    if from_zero:
        axes.barh(place, value["mean"], color=ACCENT, alpha=0.35, height=0.7)
    else:
        axes.plot([value["mean"]], [place], "|", color=ACCENT, ms=12, mew=3)
    axes.plot(value["values"], [place] * len(value["values"]), "o", color=INK, ms=3)


def _scale(axes: Any, metric: str, means: list[float]) -> None:
    if metric not in FROM_ZERO and means and max(means) > LOGARITHMIC_FROM * min(means):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))


def learning_curves(curves: dict[str, list[list[tuple[int, float]]]]) -> Figure:
    """Smoothed training bits per byte against steps: the mean over seeds, and a band from the lowest to the highest.

    The steep first tenth of the steps may leave at the top.
    """
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for number, (name, seeds) in enumerate(curves.items()):
        begun = [dict(points) for points in seeds if points]
        if not begun:
            continue
        style = {"color": colours[number % len(colours)], "ls": LINES[number // len(colours) % len(LINES)]}
        steps = sorted(set.intersection(*(set(points) for points in begun)))
        values = [[points[step] for points in begun] for step in steps]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, [fmean(own) for own in values], lw=1.2, label=name, marker=marker, **style)
        if len(begun) > 1:
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=style["color"], alpha=0.12, lw=0)
    _leave_out_the_fall(axes, curves)
    axes.set(xlabel="optimiser step", ylabel="bits per byte in training, mean of the last steps (20 at most)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(curves) // 28)
    _bare(axes)
    return figure


def _leave_out_the_fall(axes: Any, curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    runs = [points for seeds in curves.values() for points in seeds]
    settled = [bits for points in runs for step, bits in points if 10 * step >= points[-1][0]]
    if len(set(settled)) > 1:
        axes.set_ylim(top=max(settled) + 0.05 * (max(settled) - min(settled)))


def _label_apart(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Names in a column at the right, in the order of their points, joined to them by thin lines."""
    order = sorted(rows, key=lambda row: -row["metrics"]["held_out_bits_per_byte"]["mean"])
    for place, row in enumerate(order):
        point = tuple(_in_units(row, name)["mean"] for name in ("flops_per_token", "held_out_bits_per_byte"))
        axes.annotate(
            row["variant"],
            point,
            xytext=(1.03, 0.98 - 0.96 * place / max(1, len(order) - 1)),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": SOFT, "lw": 0.6},
        )


def _troubles(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['variant']}, {trouble}" for row in rows for trouble in row["troubles"]]


def _in_units(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A metric in the unit of its column."""
    unit, value = METRICS[name].unit, row["metrics"][name]
    spread = None if value["spread"] is None else value["spread"] / unit
    return {"mean": value["mean"] / unit, "spread": spread, "values": [one / unit for one in value["values"]]}


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(metric.label)}</th>" for metric in METRICS.values())
    lines = []
    for row in rows:
        trouble = f' <span class="trouble">{html.escape(row["status"])}</span>' if row["status"] else ""
        cells = "".join(f"<td>{cell(row, name)}</td>" for name in METRICS)
        lines.append(f"<tr><td>{html.escape(row['variant'])}{trouble}</td>{cells}</tr>")
    return f"<table><thead><tr><th>variant</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
