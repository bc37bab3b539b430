"""Figures of the demo's report, each as inline SVG.

Shapes: L MoE layers, E experts, G GPUs.
"""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .pages import ACCENT, COLOURS, INK, SOFT

PAGE_WIDTH = 9.6
"""Inches: figures are drawn as wide as the page's text, so that their letters are of its size."""


def inline_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that scales with the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "expertier"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_figure(log: list[dict[str, Any]], last: tuple[int, float], yardsticks: dict[str, float]) -> Figure:
    """Bits per byte against steps, training and held-out, with one line per yardstick.

    Args:
        log: rows of `metrics.jsonl`.
        last: step and held-out bits per byte of the finished model, where the curve ends.
        yardsticks: bits per byte of other models, by name.
    """
    figure, axes = _figure(3.8)
    axes.plot([row["step"] for row in log], [row["bits_per_byte"] for row in log], color=SOFT, lw=1, label="training")
    held_out = [(row["step"], row["held_out_bits_per_byte"]) for row in log if "held_out_bits_per_byte" in row]
    held_out = [point for point in held_out if point[0] < last[0]] + [last]
    axes.plot(*zip(*held_out, strict=True), "o-", color=ACCENT, label="held-out files")
    for (name, bits), style in zip(yardsticks.items(), ("--", ":"), strict=True):
        axes.axhline(bits, color=INK, ls=style, lw=1, label=f"byte {name} ({bits:.2f})")
    axes.set(xlabel="optimiser step", ylabel="bits per byte", ylim=(0, min(8, max(r["bits_per_byte"] for r in log))))
    axes.legend(frameon=False)
    return figure


def load_figure(load_LE: NDArray[Any]) -> Figure:
    """Share of the tokens per expert (columns) and layer (rows), as a multiple of the uniform share."""
    figure, axes = _figure(3.0)
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    image = axes.imshow(relative_LE, cmap="viridis", aspect="auto", vmin=0)
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="load / mean")
    return figure


def hit_rate_figure(hit_rates: dict[str, list[float]], chosen: int) -> Figure:
    """Hit rate against slots per layer, one curve per policy; the demo's own cache size is marked."""
    figure, axes = _figure(3.8)
    for (policy, rates), colour in zip(hit_rates.items(), COLOURS, strict=False):
        axes.plot(range(1, len(rates) + 1), rates, "o-", ms=3, color=colour, label=policy)
    axes.axvline(chosen, color=SOFT, lw=1)
    axes.text(chosen, 0.02, " the run above", color=INK, fontsize=8)
    axes.set(xlabel="RAM slots per layer", ylabel="hit rate", ylim=(0, 1.02))
    axes.legend(frameon=False)
    return figure


def placement_figure(load_LG: dict[str, NDArray[np.float64]]) -> Figure:
    """Load of each GPU and layer relative to the mean GPU, one panel per plan, on one scale."""
    figure = Figure(figsize=(PAGE_WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(load_LG), sharey=True)
    relative = {name: load / load.mean(axis=1, keepdims=True) for name, load in load_LG.items()}
    top = max(float(load.max()) for load in relative.values())
    for axes, (name, load) in zip(panels, relative.items(), strict=True):
        image = axes.imshow(load, cmap="magma", aspect="auto", vmin=0, vmax=top)
        axes.set(title=name, xlabel="GPU")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("MoE layer")
    figure.colorbar(image, ax=panels, label="load / mean")
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
