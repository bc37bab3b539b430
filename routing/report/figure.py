"""The picture of `expertier trace show --plot`: hit rates against cache size, SRP and SCH against layers."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"belady_bypass": "#868e96", "belady": "#0b7285", "lru": "#e8590c", "most_used": "#5f3dc4"}
LABELS = {
    "belady_bypass": "Belady, may bypass",
    "belady": "Belady, must admit",
    "lru": "LRU",
    "most_used": "most used stay",
}
SHADES = ("#a5d8ff", "#4dabf7", "#1971c2", "#0b3d66")


def draw(file: Path, found: dict[str, Any]) -> None:
    """Draw what `locality` found; the file's ending says the format.

    Raises:
        ValueError: if matplotlib does not know the format.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (curves, layers), (windows, ratios) = figure.subplots(2, 2)
    per_layer = found["per_layer"]
    _curves(curves, found)
    _curves_of_layers(layers, per_layer)
    srp = {f"m = {window}": [layer["srp"][window]["f1"] for layer in per_layer] for window in found["srp"]}
    _lines(windows, "SRP: best F1 of one set for m tokens", srp)
    sch = {f"{ratio} x K slots": [layer["sch"][ratio]["16"] for layer in per_layer] for ratio in found["sch"]}
    _lines(ratios, "SCH: hit rate, 16 tokens known", sch)
    figure.savefig(file, dpi=150)


def _curves(axes: Axes, found: dict[str, Any]) -> None:
    """Hit rates of all layers together."""
    sizes = [int(size) for size in found["hit_rate"]]
    for name, colour in COLOURS.items():
        rates = [rates[name] for rates in found["hit_rate"].values()]
        axes.plot(sizes, rates, "o-", ms=3, color=colour, label=LABELS[name])
    axes.set(xlabel="slots per layer", ylabel="hit rate", ylim=(0, 1.02), title="Hit rate, all layers")
    axes.legend(frameon=False, loc="lower right")


def _curves_of_layers(axes: Axes, per_layer: list[dict[str, Any]]) -> None:
    """Hit rates of each layer at the smaller sizes, Belady solid and LRU dashed."""
    sizes = list(per_layer[0]["hit_rate"])[: len(SHADES)]
    _lines(
        axes,
        "Hit rate per layer (dashed: LRU)",
        {f"Belady, {size} slots": [layer["hit_rate"][size]["belady"] for layer in per_layer] for size in sizes},
    )
    for size, colour in zip(sizes, SHADES, strict=False):
        axes.plot([layer["hit_rate"][size]["lru"] for layer in per_layer], "--", color=colour)


def _lines(axes: Axes, title: str, rates: dict[str, list[float]]) -> None:
    for (label, values), colour in zip(rates.items(), SHADES, strict=False):
        axes.plot(values, "o-", ms=3, color=colour, label=label)
    axes.set(xlabel="MoE layer", ylim=(0, 1.02), title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if rates:
        axes.legend(frameon=False, ncols=2, loc="lower center")
