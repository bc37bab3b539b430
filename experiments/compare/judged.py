"""Judging: what a comparison was told about its judgement before it ran, and what weakens it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from routing.ground.files import write_json

from ..judging.equivalence import expect_margin
from .runs import RESULT_FILE, Run

MARGIN_FILE = "compare_margin.json"
FEW_SEEDS = 3
"""Fewer give intervals that hold almost any difference: Student's factor is 12.7 with two and 4.3 with three."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How runs are judged.

    Args:
        margin: bits per byte within which variants count as equal; None if none was stated.
        is_tuned: whether each variant has a learning rate of its own, from a sweep.
    """

    margin: float | None
    is_tuned: bool

    @property
    def facts(self) -> dict[str, str]:
        """For the page: a name and a line each."""
        if self.margin is None:
            return {}
        return {"margin": f"±{self.margin:g} bits per byte, stated before the first run; two one-sided tests at 5 %"}

    def warnings(self, runs: Sequence[Run]) -> list[str]:
        """What a reader must know before believing the numbers."""
        variants = {run.variant for run in runs}
        found = []
        if len(variants) > 1 and not self.is_tuned:
            found.append(
                f"all {len(variants)} variants share one learning rate ({runs[0].config.learning_rate:g}), which was "
                "tuned for none of them; `expertier sweep` finds one for each, and `--rates` takes what it found"
            )
        seeds = len({run.config.seed for run in runs})
        if len(variants) > 1 and seeds < FEW_SEEDS:
            found.append(f"{seeds} seed{'s' * (seeds > 1)} per variant; differences need {FEW_SEEDS} or more")
        return found


def stated_margin(out: Path, margin: float | None) -> float | None:
    """The margin of a comparison: what was stated before its first run ended, and is stated now if none has ended.

    Args:
        out: folder of the comparison.
        margin: as it is said now; None takes what was stated.

    Raises:
        ValueError: if it is no positive number, or is stated or changed after runs have ended.
    """
    file = out / MARGIN_FILE
    found = json.loads(file.read_text(encoding="utf-8"))["margin"] if file.is_file() else None
    if margin is None or margin == found:
        return found
    expect_margin(margin)
    if any(out.glob(f"runs/*/*/{RESULT_FILE}")):
        raise ValueError(
            f"runs of {out} had ended {'without a margin' if found is None else f'under the margin {found:g}'}; "
            "a margin is stated before the runs that it judges, so use another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, {"margin": margin, "stated": datetime.now().astimezone().isoformat(timespec="seconds")})
    return margin
