"""The page of a comparison: tables, figures, legend, in one self-contained HTML file."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from routing.ground.files import atomic_write

from ..evidence.figures import inline_svg
from ..evidence.pages import STYLE
from .charts import Curves, learning_curves, panels, trade_off
from .summary import METRICS, cell, difference_cell

TABLES: dict[str, tuple[str, ...]] = {
    "Quality": ("held_out_bits_per_byte", "cloze", "copying"),
    "Cost": ("flops_per_token", "active_parameters", "parameters", "tokens_per_second"),
    "How experts are used": ("true_load", "max_vio", "dead_experts", "active_hidden", "byte_coverage"),
    "How the router decides": ("router_entropy", "inner_balance", "outer_balance", "mutual_information"),
    "How well experts cache": ("predictability", "lru_hit_rate", "srp"),
}
"""Every metric in one of them, few enough that none is wider than the page."""


def write_page(
    path: Path, rows: list[dict[str, Any]], curves: Curves, facts: dict[str, str], warnings: Sequence[str] = ()
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        rows: from `summarise`.
        curves: per variant and seed, (step, training bits per byte).
        facts: how the runs were made: a name and a line each.
        warnings: what a reader must know before believing the numbers.
    """
    finished = [row for row in rows if row["metrics"]]
    names = [row["variant"] for row in rows]
    figures = [trade_off(finished, names), panels(finished)] if finished else []
    if any(points for seeds in curves.values() for points in seeds):
        figures.append(learning_curves(curves, names))
    body = [
        "<h1>Routers compared</h1>",
        '<p class="lead">The same model, text and seeds with each router. An arrow says where a number is better.</p>',
        *(f'<p class="trouble">{html.escape(warning)}</p>' for warning in warnings),
        *(_table(title, metrics, rows) for title, metrics in TABLES.items()),
        *(f'<p class="trouble">{html.escape(trouble)}</p>' for trouble in _troubles(rows)),
        "<h2>Figures</h2>",
        *(inline_svg(figure) for figure in figures),
        "<h2>What the columns mean</h2>",
        _definitions({metric.heading: metric.meaning for metric in METRICS.values()}),
        "<h2>How it was made</h2>",
        _definitions(facts),
    ]
    plt.close("all")
    with atomic_write(path) as file:
        file.write(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Routers compared</title>'
            f"<style>{STYLE}</style>{''.join(body)}</html>"
        )


def _table(title: str, metrics: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """One table; the first also has the difference to the first variant."""
    is_first = "held_out_bits_per_byte" in metrics and len(rows) > 1
    headings = [METRICS[name].heading for name in metrics]
    if is_first:
        headings[1:1] = [f"against {rows[0]['variant']}, 95 %", "effect size", "verdict"]
    lines = []
    for row in rows:
        cells = [cell(row, name) for name in metrics]
        if is_first:
            cells[1:1] = difference_cell(row)
        trouble = f' <span class="trouble">{html.escape(row["status"])}</span>' if row["status"] else ""
        numbers = "".join(f'<td class="number">{html.escape(text)}</td>' for text in cells)
        lines.append(f"<tr><td>{html.escape(row['variant'])}{trouble}</td>{numbers}</tr>")
    head = "".join(f'<th class="number">{html.escape(heading)}</th>' for heading in headings)
    return (
        f'<h2>{title}</h2><div class="wide"><table><thead><tr><th>variant</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _definitions(facts: dict[str, str]) -> str:
    lines = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(lines)}</dl>"


def _troubles(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['variant']}, {trouble}" for row in rows for trouble in row["troubles"]]
