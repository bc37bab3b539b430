"""The demo's report: one HTML file that needs nothing else."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from offload import format_size
from routing.ground.files import atomic_write
from routing.traces import load_LE

from ..evidence.figures import hit_rate_figure, inline_svg, load_figure, loss_figure, placement_figure
from ..evidence.pages import STYLE, provenance
from .result import DemoResult

TEMPLATE = "demo.html.jinja"


def write_page(path: Path, result: DemoResult) -> Path:
    """Write the report, atomically; returns its path."""
    templates = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=templates, autoescape=True, undefined=StrictUndefined).get_template(TEMPLATE)
    with atomic_write(path) as file:
        file.write(template.render(_contents(result, path.parent)))
    return path


def _contents(result: DemoResult, folder: Path) -> dict[str, Any]:
    certificate = result.placements.plan.certificate
    return {
        "style": Markup(STYLE),
        "provenance": provenance(),
        "commands": _commands(folder),
        "cards": _cards(result),
        "model": result.config.model,
        "trained": result.trained,
        "bits": result.trained.held_out_bits_per_byte,
        "yardsticks": result.yardsticks,
        "offloaded": result.offloaded,
        "quarter": _quarter(result),
        "bytes_read": format_size(result.offloaded.report["bytes_read"]),
        "num_tokens": result.trace.num_tokens,
        "cluster": result.placements.cluster,
        "scores": result.placements.scores,
        "gap": None if certificate is None else certificate.gap,
        "bound_name": None if certificate is None else certificate.bound_name,
        "times": result.seconds | {"all": sum(result.seconds.values())},
        "figures": {name: Markup(svg) for name, svg in _figures(result).items()},
    }


def _commands(folder: Path) -> list[str]:
    """What a reader may try on the demo's own files."""
    return [
        f"expertier generate {folder}/model --prompt 'def main(' --cache-experts 4",
        f"expertier simulate {folder}/routing.npz --cache-experts 4 --per-layer",
        f"expertier place score {folder}/plan.json --trace {folder}/routing.npz",
        f"expertier export {folder}/model --to olmoe --out {folder}/olmoe",
        "expertier train --preset e16 --data YOUR_TEXT --out runs/mine",
    ]


def _cards(result: DemoResult) -> list[tuple[str, str]]:
    bits, bigram = result.trained.held_out_bits_per_byte, result.yardsticks.bigram
    before, after = (result.placements.scores[name].node_fanout for name in ("contiguous", "solved"))
    return [
        (f"{bits:.2f}", f"bits per byte on held-out text (bigram {bigram:.2f})"),
        ("identical", f"tokens and logits with {_quarter(result)} in RAM"),
        (f"{result.offloaded.report['hit_rate']:.0%}", "of expert accesses found in RAM"),
        (f"{before:.2f} → {after:.2f}", "nodes that hold a token's experts, on unseen text"),
    ]


def _figures(result: DemoResult) -> dict[str, str]:
    yardsticks = {"bigram": result.yardsticks.bigram, "trigram": result.yardsticks.trigram}
    figures = {
        "loss": loss_figure(result.log, (result.trained.steps, result.trained.held_out_bits_per_byte), yardsticks),
        "load": load_figure(load_LE(result.trace)),
        "hit_rate": hit_rate_figure(result.hit_rates, result.offloaded.cache_experts),
        "placement": placement_figure(result.placements.load_LG),
    }
    return {name: inline_svg(figure) for name, figure in figures.items()}


def _quarter(result: DemoResult) -> str:
    return f"{result.offloaded.cache_experts} of {result.trace.num_experts} experts per layer"
