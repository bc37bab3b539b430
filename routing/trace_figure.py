"""The picture of `expertier trace show --plot`: hit rates against cache size, SRP and SCH against layers."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"belady": "#0b7285", "lru": "#e8590c", "most_used": "#5f3dc4"}
SHADES = ("#a5d8ff", "#4dabf7", "#1971c2", "#0b3d66")


def draw(file: Path, found: dict[str, Any]) -> None:
    """Draw what `locality` found; the file's ending says the format.

    Raises:
        ValueError: if matplotlib does not know the format.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, windows, ratios = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _curves(curves, found)
    per_layer = found["per_layer"]
    _lines(
        windows,
        "SRP: best F1 of one set for m tokens",
        {f"m = {w}": [x["srp"][w]["f1"] for x in per_layer] for w in found["srp"]},
    )
    _lines(
        ratios,
        "SCH: hit rate, 16 tokens known",
        {f"{r} x K slots": [x["sch"][r]["16"] for x in per_layer] for r in found["sch"]},
    )
    figure.savefig(file, dpi=150)


def _curves(axes: Axes, found: dict[str, Any]) -> None:
    """All layers as a line, and the range from the worst layer to the best as a band."""
    sizes = [int(size) for size in found["hit_rate"]]
    for name, colour in COLOURS.items():
        layers = [[rates[name] for rates in layer["hit_rate"].values()] for layer in found["per_layer"]]
        axes.fill_between(sizes, np.min(layers, axis=0), np.max(layers, axis=0), color=colour, alpha=0.1, lw=0)
        rates = [rates[name] for rates in found["hit_rate"].values()]
        axes.plot(sizes, rates, "o-", ms=3, color=colour, label=name.replace("_", " "))
    axes.set(xlabel="slots per layer", ylabel="hit rate", ylim=(0, 1), title="all layers; shaded: worst to best layer")
    axes.legend(frameon=False, loc="lower right")


def _lines(axes: Axes, title: str, rates: dict[str, list[float]]) -> None:
    for (label, values), colour in zip(rates.items(), SHADES, strict=False):
        axes.plot(values, "o-", ms=3, color=colour, label=label)
    axes.set(xlabel="MoE layer", ylim=(0, 1), title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=2, loc="lower center")
