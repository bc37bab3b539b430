"""Figures of a comparison: cost against quality, one panel per metric, learning curves; a variant has one colour."""

from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ..evidence.figures import PAGE_WIDTH
from ..evidence.pages import ACCENT, COLOURS, INK, LINES, MARKERS, SOFT
from .summary import METRICS

Curves = dict[str, list[list[tuple[int, float]]]]
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
# three panels stay readable at 1,200 pixels
PANELS_IN_A_ROW = 3
FROM_ZERO = set(PANELS) - {"held_out_bits_per_byte", "inner_balance"}
LOGARITHMIC_FROM = 10
"""From this ratio of its largest to its smallest value on, a panel without zero is logarithmic."""
LEGEND_ROWS = 24
"""Names below each other in a legend before it gets another column."""


def trade_off(rows: list[dict[str, Any]], names: list[str]) -> Figure:
    """Bits per byte against operations per token, with the spread over seeds.

    Args:
        rows: of variants that have finished runs.
        names: all variants, which fixes their colours.
    """
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 4.6), layout="constrained")
    for row in rows:
        x, y = (_in_units(row, name) for name in ("flops_per_token", "held_out_bits_per_byte"))
        colour, place = _colour(row["variant"], names)
        style = {"color": colour, "ecolor": SOFT, "ms": 6, "capsize": 2, "label": row["variant"]}
        marker = MARKERS[place % len(MARKERS)]
        axes.errorbar(x["mean"], y["mean"], xerr=x["spread"], yerr=y["spread"], fmt=marker, **style)
    axes.set(xlabel="MFLOP per token, forward (less is better)", ylabel="bits per byte, held out (less is better)")
    axes.margins(x=0.12, y=0.1)
    _legend(axes, len(rows))
    _bare(axes)
    return figure


def panels(rows: list[dict[str, Any]]) -> Figure:
    """One panel per metric: means as bars where zero means something, as ticks elsewhere; seeds as dots."""
    names = [row["variant"] for row in rows]
    num_rows = -(-len(PANELS) // PANELS_IN_A_ROW)
    size = (PAGE_WIDTH, num_rows * max(1.8, 0.22 * len(names) + 0.8))
    figure, grid = plt.subplots(num_rows, PANELS_IN_A_ROW, figsize=size, sharey=True, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for axes, metric in zip(grid.flat, PANELS, strict=True):
        for place, row in enumerate(rows):
            if metric in row["metrics"]:
                _draw_value(axes, place, _in_units(row, metric), from_zero=metric in FROM_ZERO)
        axes.set_title(METRICS[metric].heading, fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(axis="y", color=SOFT, lw=0.3)
        _scale(axes, metric, [_in_units(row, metric)["mean"] for row in rows if metric in row["metrics"]])
        _bare(axes)
    grid.flat[0].invert_yaxis()
    return figure


def learning_curves(curves: Curves, names: list[str]) -> Figure:
    """Smoothed training bits per byte against steps: the mean over seeds, and a band from the lowest to the highest.

    The steep first tenth of the steps may leave at the top.
    """
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 4.8), layout="constrained")
    for name, seeds in curves.items():
        begun = [dict(points) for points in seeds if points]
        if not begun:
            continue
        colour, place = _colour(name, names)
        steps = sorted(set.intersection(*(set(points) for points in begun)))
        values = [[points[step] for points in begun] for step in steps]
        style = {"color": colour, "ls": LINES[place % len(LINES)], "marker": "o" if len(steps) == 1 else None}
        axes.plot(steps, [fmean(own) for own in values], lw=1.2, label=name, **style)
        if len(begun) > 1:
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.12, lw=0)
    _leave_out_the_fall(axes, curves)
    axes.set(xlabel="optimiser step", ylabel="bits per byte in training, mean of 20 steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, len(curves))
    _bare(axes)
    return figure


def _colour(name: str, names: list[str]) -> tuple[str, int]:
    """A variant's colour, and how many variants before it have the same one."""
    place = names.index(name)
    return COLOURS[place % len(COLOURS)], place // len(COLOURS)


def _legend(axes: Any, count: int) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + count // LEGEND_ROWS)


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
        axes.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))


def _leave_out_the_fall(axes: Any, curves: Curves) -> None:
    runs = [points for seeds in curves.values() for points in seeds]
    settled = [bits for points in runs for step, bits in points if 10 * step >= points[-1][0]]
    if len(set(settled)) > 1:
        axes.set_ylim(top=max(settled) + 0.05 * (max(settled) - min(settled)))


def _in_units(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A metric in the unit of its column."""
    unit, value = METRICS[name].unit, row["metrics"][name]
    spread = None if value["spread"] is None else value["spread"] / unit
    return {"mean": value["mean"] / unit, "spread": spread, "values": [one / unit for one in value["values"]]}


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
