"""run.html: one run as a page that needs nothing else: curves to look into, loads, alerts, settings, judgement.

Shapes: L MoE layers, E experts.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from routing.ground.files import atomic_write

from ...evidence.pages import STYLE, provenance
from ..description.description import RUN_FILE
from ..metrics import read_log
from ..run_folder import LOG_FILE

PAGE, RESULT, JUDGEMENT = "run.html", "result.json", "judgement.json"
POINTS, COLUMNS = 600, 120
"""Points of a curve and columns of a map of loads, at most: what a page's width can show."""
CURVES = {
    "bits per byte": ("bits_per_byte", "held_out_bits_per_byte"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("gradient_norm",),
    "balance: largest load over the mean, minus 1": ("max_vio",),
    "router entropy, nats": ("router_entropy",),
    "tokens per second": ("tokens_per_second",),
}


def write_run_page(run: Path) -> Path:
    """Write `<run>/run.html` from what the run has left so far; returns its path."""
    rows = read_log(run / LOG_FILE) if (run / LOG_FILE).is_file() else []
    result, judgement = _read(run / RESULT), _read(run / JUDGEMENT)
    content = {
        "style": Markup(STYLE),
        "name": run.absolute().name,
        "cards": _cards(rows, result),
        # a script ends at the first `</`, wherever it stands
        "data": Markup(json.dumps({"curves": curves(rows), "loads": loads(rows)}).replace("</", "<\\/")),
        "alerts": [f"step {row['step']}, {line}" for row in rows for line in row.get("alerts", ())],
        "judgement": judgement,
        "settings": (run / RUN_FILE).read_text(encoding="utf-8") if (run / RUN_FILE).is_file() else "",
        "provenance": provenance(),
    }
    with atomic_write(run / PAGE) as file:
        file.write(_template().render(content))
    return run / PAGE


def curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each picture's title and lines; a line has a name and points (step, value), means where there are many."""
    found = []
    for title, names in CURVES.items():
        lines = [{"name": name, "points": _points(rows, name)} for name in names]
        lines = [line for line in lines if line["points"]]
        if lines:
            found.append({"title": title, "lines": lines})
    return found


def loads(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Shares of the experts [L][E] of some steps, evenly chosen; None without routers."""
    seen = [row for row in rows if row.get("load")]
    if not seen:
        return None
    stride = -(-len(seen) // COLUMNS)
    return {"steps": [row["step"] for row in seen[::stride]], "shares": [row["load"] for row in seen[::stride]]}


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    size = -(-len(known) // POINTS) or 1
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _cards(rows: Sequence[dict[str, Any]], result: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not rows:
        return []
    held_out = [row["held_out_bits_per_byte"] for row in rows if row.get("held_out_bits_per_byte") is not None]
    bits = result["held_out_bits_per_byte"] if result else held_out[-1] if held_out else None
    return [
        ("-" if bits is None else f"{bits:.3f}", "bits per byte, held out"),
        (str(rows[-1]["step"]), "steps, finished" if result else "steps so far"),
        (str(sum(len(row.get("alerts", ())) for row in rows)), "alerts"),
    ]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@cache
def _template() -> Template:
    templates = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=templates, autoescape=True, undefined=StrictUndefined).get_template("run.html.jinja")
