"""What the expert kernels are meant to reach on an H100 or H200, and what a benchmark run found of it.

Shapes: T tokens.
Source: published figures of the best Triton kernels per layer; `moe/kernels/README.md` and `docs/kernels.md` name them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OURS = "expertier"
# measured before all others, so that a run that is short of time still answers the goals
GOAL_TOKENS = (32768, 16384, 64, 8, 1)


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Args:
        name: label in tables and records.
        wanted: least value, or largest one where `is_most`.
        values: what a run's rows say about it, one value per case.
        is_most: whether `wanted` is the most allowed; else the least.
    """

    name: str
    wanted: float
    values: Callable[[Sequence[Row]], list[float]]
    is_most: bool = False

    def verdict(self, rows: Sequence[Row]) -> Row:
        """The worst case against the bound; `unmeasured` where no case was measured."""
        found = self.values(rows)
        bound = f"{'<=' if self.is_most else '>='} {self.wanted:g}"
        if not found:
            return {"goal": self.name, "wanted": bound, "worst": None, "best": None, "verdict": "unmeasured"}
        worst, best = (max(found), min(found)) if self.is_most else (min(found), max(found))
        is_met = worst <= self.wanted if self.is_most else worst >= self.wanted
        return {
            "goal": self.name,
            "wanted": bound,
            "worst": worst,
            "best": best,
            "verdict": "met" if is_met else "missed",
        }


def _ours(rows: Sequence[Row], kind: str = "forward", variant: str = OURS) -> list[Row]:
    return [row for row in rows if (row["variant"], row["pass"], row["routing"]) == (variant, kind, "uniform")]


def _tflops(shape: str, kind: str) -> Callable[[Sequence[Row]], list[float]]:
    def values(rows: Sequence[Row]) -> list[float]:
        return [row["tflops_per_s"] for row in _ours(rows, kind) if row["shape"] == shape and row["tokens"] >= 16384]

    return values


def _bandwidth(least: int, most: int) -> Callable[[Sequence[Row]], list[float]]:
    def values(rows: Sequence[Row]) -> list[float]:
        return [row["of_copy_bandwidth"] for row in _ours(rows) if least <= row["tokens"] <= most]

    return values


def _int4_speed_up(rows: Sequence[Row]) -> list[float]:
    dense_us = {row["shape"]: row["p50_us"] for row in _ours(rows) if row["tokens"] == 1}
    int4_us = {row["shape"]: row["p50_us"] for row in _ours(rows, variant=f"{OURS} int4") if row["tokens"] == 1}
    return [round(dense_us[shape] / int4_us[shape], 3) for shape in dense_us.keys() & int4_us.keys()]


def _saved(rows: Sequence[Row]) -> list[float]:
    return [row["saved_of_least"] for row in rows if row["variant"] == OURS and row.get("saved_of_least") is not None]


# what was wanted of each layer, see the table in docs/kernels.md
GOALS = (
    Goal("qwen3-30b-a3b, T >= 16384, forward, TFLOP/s", 480, _tflops("qwen3-30b-a3b", "forward")),
    Goal("qwen3-30b-a3b, T >= 16384, forward+backward, TFLOP/s", 400, _tflops("qwen3-30b-a3b", "forward+backward")),
    Goal("mixtral-8x7b, T >= 16384, forward, TFLOP/s", 550, _tflops("mixtral-8x7b", "forward")),
    Goal("fine-grained-7b, T >= 16384, forward, TFLOP/s", 330, _tflops("fine-grained-7b", "forward")),
    Goal("decode, T = 1..8, share of copy bandwidth", 0.80, _bandwidth(1, 8)),
    Goal("decode, T = 64, share of copy bandwidth", 0.85, _bandwidth(64, 64)),
    Goal("int4 decode against bf16, T = 1, times as fast", 2.5, _int4_speed_up),
    Goal("saved for backward / (input + pre-activation)", 1.05, _saved, is_most=True),
)


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Every goal with what was found.

    Args:
        rows: lines of the table on a GPU; a goal takes those of its own case.

    Returns:
        One row per goal: worst and best case, and `met`, `missed` or `unmeasured`.
    """
    return [goal.verdict(rows) for goal in GOALS]
