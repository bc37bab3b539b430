"""One self-contained HTML page about a plan: every picture inlined, nothing loaded from elsewhere.

Shapes: L layers, G GPUs, T tokens.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from routing.ground.files import atomic_write

from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..objectives.latency import layer_times
from ..scoring.score import METRICS, Score
from ..solving.comparison import Row, compare_with_baselines
from .names import short_names
from .pictures import gaps, imbalance_over_time, load_maps, pareto, traffic_GG, traffic_maps

__all__ = ["line", "traffic_GG", "write_page", "write_report"]

Float = NDArray[np.float64]
A2A_TIME_PER_BYTE_SAVED = (9 / 20, 12 / 20)  # 20 % fewer bytes gave 9 to 12 % less all-to-all time
CSS = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%}figcaption{color:#555}figure{margin:1.5rem 0}"""


def write_report(
    problem: Problem, plan: Plan, path: Path, *, with_pareto: bool = False, other: Plan | None = None
) -> None:
    """Compare a plan with the contiguous layout, EPLB and perhaps another plan on the problem's data.

    Args:
        problem: the data that all rows are judged on; with tokens the page also shows traffic.
        plan: its own planning data, if the file keeps them, are what EPLB is made from.
        path: where the page goes; it replaces an older one as a whole.
        with_pareto: also solve for the front of balance against fan-out (about a minute).
        other: the plan that pictures and gains are relative to; None takes the contiguous layout.
    """
    rows = compare_with_baselines(plan, problem, other)
    before, scenario = rows[0] if other is None else rows[-2], problem.scenarios[0]
    judged = ", ".join(short_names(scenario.name for scenario in problem.scenarios).values())
    sections = [_table(rows, judged), _gain(before, rows[-1].score), _times(rows, scenario)]
    sections.append(_certificate(plan, rows[-1].planned_on))
    caption = "Load of each rank over the mean, layer by layer."
    sections.append(_figure(load_maps(problem, before, plan), caption))
    trace = scenario.trace
    if trace is not None:
        caption = "Expert calls from the token's home rank (sequence number mod ranks) to the serving rank, per token."
        sections.append(_figure(traffic_maps(trace, before, plan), caption))
        caption = "Imbalance of batches of ep.batch_tokens tokens in the order of the traffic, mean over layers."
        sections.append(_figure(imbalance_over_time(trace, rows), caption))
    if plan.certificate is not None and plan.certificate.gap_L:
        caption = "Gap between objective and bound on the planning data, per layer."
        sections.append(_figure(gaps(plan.certificate.gap_L), caption))
    if with_pareto and problem.has_tokens:
        caption = "Balance against fan-out; each point of the line is a plan that was made knowing this data."
        sections.append(_figure(pareto(problem, rows), caption))
    title = f"Expert placement: {plan.num_layers} layers, {plan.num_experts} experts, {plan.cluster.num_gpus} GPUs"
    write_page(path, title, sections)


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write sections of HTML under a title, atomically."""
    heading = html.escape(title)
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{heading}</title><style>{CSS}</style>"
        f"<h1>{heading}</h1>{''.join(sections)}</html>\n"
    )
    with atomic_write(path) as file:
        file.write(page)


def _table(rows: list[Row], judged: str) -> str:
    titles = ("plan", "planned on", "judged on", "balancedness", "GPUs per token", "nodes per token", "hops")
    lines = [line(titles, "th")]
    for row in rows:
        numbers = [_number(getattr(row.score, key)) for key in METRICS]
        lines.append(line((row.name, _names(row.planned_on), judged, *numbers), "td"))
    return f"<table>{''.join(lines)}</table>"


def line(cells: Sequence[str], tag: str) -> str:
    """One row of a table; the cells are text."""
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _names(planned_on: str) -> str:
    return ", ".join(short_names(planned_on.split(", ")).values())


def _gain(before: Row, after: Score) -> str:
    ratio, fanout = before.score.balancedness / after.balancedness, before.score.gpu_fanout
    lines = [f"Expert time, which the fullest GPU sets, goes to {ratio:.3f} of before."]
    if fanout and after.gpu_fanout:
        saved = 1 - after.gpu_fanout / fanout
        low, high = (saved * share for share in A2A_TIME_PER_BYTE_SAVED)
        lines.append(
            f"{saved:.1%} fewer copies of tokens are sent between GPUs. Kernels pad to the fullest rank: in published "
            f"measurements 20 % fewer bytes gave 9 to 12 % less all-to-all time, so expect {low:.1%} to {high:.1%}."
        )
    lines.append("These are model values on the given data, not measurements of an engine.")
    title = f"Expected gain over the {before.name if before.name != 'contiguous' else 'contiguous layout'}"
    return f"<h2>{title}</h2><p>{' '.join(map(html.escape, lines))}</p>"


def _times(rows: list[Row], scenario: Scenario) -> str:
    """Milliseconds of a MoE layer by the latency model; a sentence where the cluster lacks the model's sizes."""
    title = "<h2>Modelled time of one batch</h2>"
    lines = [line(("plan", "experts, ms per layer", "dispatch and combine, ms per layer", "tokens/s per GPU"), "th")]
    try:
        for row in rows:
            times = layer_times(row.plan, scenario.load_LE, scenario.trace)
            numbers = (1e3 * times.experts_s, 1e3 * times.traffic_s, times.tokens_per_s)
            lines.append(line((row.name, *map(_number, numbers)), "td"))
    except ValueError as error:
        return f"{title}<p>{html.escape(f'Not told: {error}.')}</p>"
    tokens = rows[-1].plan.cluster.ep.tokens_per_gpu
    text = f"MoE layers alone, {tokens} tokens per GPU (ep.tokens_per_gpu); attention and the rest are not in it."
    return f"{title}<table>{''.join(lines)}</table><p>{html.escape(text)}</p>"


def _certificate(plan: Plan, planned_on: str) -> str:
    certificate = plan.certificate
    if certificate is None:
        return ""
    gap = "no bound" if certificate.gap is None else f"gap {certificate.gap:.3%}"
    text = (
        f"Objective {certificate.objective_name} = {certificate.objective:.6g}, bound {_number(certificate.bound)} "
        f"({certificate.bound_basis}), {gap}; solver {plan.solver}, {certificate.seconds:.1f} s. "
        "All of this is about the planning data, not about the data above."
    )
    labels = short_names(certificate.out_of_sample)
    rows = "".join(
        line((labels[name], _number(found["balancedness"]), _number(found["gpu_fanout"])), "td")
        for name, found in certificate.out_of_sample.items()
    )
    head = line(("data not planned on", "balancedness", "GPUs per token"), "th")
    title = html.escape(f"Certificate, on {_names(planned_on)}")
    return f"<h2>{title}</h2><p>{html.escape(text)}</p>" + (f"<table>{head}{rows}</table>" if rows else "")


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
