"""Live curves in the terminal: the loss, what is held out, the gradient, and how many experts each layer uses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .alerts import used_experts

# characters of a curve; each is two dots wide and four high
WIDTH, HEIGHT = 72, 8
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column, from Unicode's chapter 21.1."""
BLANK = 0x2800
"""The braille character without a dot; the bits are added to it."""
REFRESH_HZ = 4
"""Pictures per second: a step of a small model takes longer than a quarter of one."""
SHOWN_ALERTS = 5
"""Lines of the newest alerts, so that the picture keeps its height."""
BAR = " ▁▂▃▄▅▆▇█"


@contextmanager
def live_curves(total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """While this is open the terminal shows the curves; gives the function that is told each step's metrics."""
    rows: list[dict[str, Any]] = []
    with Live(console=Console(stderr=True), refresh_per_second=REFRESH_HZ, get_renderable=lambda: picture(rows, total)):
        yield rows.append


def picture(rows: Sequence[dict[str, Any]], total: int) -> Panel:
    """What the terminal shows after these steps of `total`."""
    if not rows:
        return Panel("waiting for the first step")
    last = rows[-1]
    bits = [row["bits_per_byte"] for row in rows]
    held_out = [row["held_out_bits_per_byte"] for row in rows if "held_out_bits_per_byte" in row]
    parts: list[Any] = [_titled("bits per byte", bits), Text(curve(bits), style="cyan")]
    parts += [_titled("gradient norm", [row["gradient_norm"] for row in rows]), _facts(last, held_out, total)]
    if last.get("load"):
        share_LE = np.array(last["load"], np.float64)
        parts.append(Text(f"experts used per layer, of {share_LE.shape[1]}: {bars(used_experts(share_LE), share_LE)}"))
    alerts = [f"step {row['step']}, {line}" for row in rows for line in row.get("alerts", ())][-SHOWN_ALERTS:]
    parts += [Text(line, style="red") for line in alerts]
    return Panel(Group(*parts), title="train", width=WIDTH + 4)


def curve(values: Sequence[float], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Values as lines of braille, the first at the left; each column is the mean of its share of them."""
    given = np.array(values, float)
    if len(given) < 2 * width:  # stretched to the whole width
        given = np.interp(np.linspace(0, len(given) - 1, 2 * width), np.arange(len(given)), given)
    columns = [float(part.mean()) for part in np.array_split(given, 2 * width)]
    low, high = min(columns), max(columns)
    cells = [[BLANK] * width for _ in range(height)]
    for place, value in enumerate(columns):
        level = 0.5 if high == low else (high - value) / (high - low)
        row = min(4 * height - 1, round(level * (4 * height - 1)))
        cells[row // 4][place // 2] |= DOTS[row % 4][place % 2]
    return "\n".join("".join(map(chr, line)) for line in cells)


def bars(used_L: Sequence[float], share_LE: Any) -> str:
    """One block per layer, full where all experts are used."""
    return "".join(BAR[min(len(BAR) - 1, round(used / share_LE.shape[1] * (len(BAR) - 1)))] for used in used_L)


def _titled(name: str, values: Sequence[float]) -> Text:
    return Text(f"{name}: {values[-1]:.3f}  (from {values[0]:.3f}, lowest {min(values):.3f})")


def _facts(last: dict[str, Any], held_out: Sequence[float], total: int) -> Table:
    table = Table.grid(padding=(0, 3))
    facts = [f"step {last['step']}/{total}", f"rate {last['learning_rate']:.3g}"]
    facts.append(f"{last['tokens_per_second']:.0f} tokens/s")
    facts += [f"held out {held_out[-1]:.3f}"] if held_out else []
    table.add_row(*facts)
    return table
