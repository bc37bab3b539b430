"""The page of a comparison: table, figures, legend, in one self-contained HTML file."""

import html
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from routing.traces import atomic_write

from .compare_summary import METRICS, cell
from .figures import ACCENT, INK, SOFT, inline_svg

PANELS = (
    "held_out_bits_per_byte",
    "true_load",
    "max_vio",
    "inner_balance",
    "mutual_information",
    "predictability",
    "lru_hit_rate",
    "srp",
)
FROM_ZERO = set(PANELS) - {"held_out_bits_per_byte", "inner_balance"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:1180px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
.wide{overflow-x:auto} th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e4e7eb;white-space:nowrap}
th:first-child,td:first-child{text-align:left} svg{max-width:100%;height:auto} .trouble{color:#c92a2a}
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
        x, y = row["metrics"]["flops_per_token"], row["metrics"]["held_out_bits_per_byte"]
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
    height = max(2.4, 0.24 * len(names) + 0.8)
    figure, grid = plt.subplots(2, len(PANELS) // 2, figsize=(12, 2 * height), sharey=True, layout="constrained")
    for axes, metric in zip(grid.flat, PANELS, strict=True):
        for place, row in enumerate(rows):
            value = row["metrics"].get(metric)
            if value is None:
                continue
            if metric in FROM_ZERO:
                axes.barh(place, value["mean"], color=ACCENT, alpha=0.35, height=0.7)
            else:
                axes.plot([value["mean"]], [place], "|", color=ACCENT, ms=12, mew=3)
            axes.plot(value["values"], [place] * len(value["values"]), "o", color=INK, ms=3)
        axes.set_title(METRICS[metric].label, fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(axis="y", color=SOFT, lw=0.3)
        if metric == "inner_balance":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        _bare(axes)
    grid.flat[0].invert_yaxis()
    return figure


def learning_curves(curves: dict[str, list[list[tuple[int, float]]]]) -> Figure:
    """Smoothed training bits per byte against steps: a line per seed, a colour per variant."""
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    colours = plt.get_cmap("turbo")
    for number, (name, seeds) in enumerate(curves.items()):
        colour = colours(0.05 + 0.9 * number / max(1, len(curves) - 1))
        for place, seed in enumerate(points for points in seeds if points):
            axes.plot(*zip(*seed, strict=True), lw=1, color=colour, label=name if place == 0 else None)
    axes.set(xlabel="optimiser step", ylabel="bits per byte in training, mean of 20 steps")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _bare(axes)
    return figure


def _label_apart(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Names in a column at the right, in the order of their points, joined to them by thin lines."""
    order = sorted(rows, key=lambda row: -row["metrics"]["held_out_bits_per_byte"]["mean"])
    for place, row in enumerate(order):
        point = (row["metrics"]["flops_per_token"]["mean"], row["metrics"]["held_out_bits_per_byte"]["mean"])
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
