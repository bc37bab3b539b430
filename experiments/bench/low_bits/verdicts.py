"""What the rows of a comparison say, seed by seed: against the line between two forms, and against llama.cpp's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import CASES, Case

Row = Mapping[str, Any]
LINE = ("int3.gptq", "int4.gptq")
"""Forms whose mixtures of whole experts lie on a line between them."""
HEAD_BITS = 0.01
"""Bits of a weight that heads of records may take on top: those of a GGUF file are not counted either."""


@dataclass(frozen=True)
class Verdict:
    """One question, answered for each seed.

    Args:
        question: in words.
        ratios: divergence as a share of what it is compared with, for each seed; less than one is better.
        winner: which of ours was compared.
    """

    question: str
    ratios: tuple[float, ...]
    winner: str


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Compare divergences; questions whose cases are not all there are left out.

    Args:
        rows: a row for each case and seed.
    """
    by = {(_name(row), row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return [*_against_the_line(by, seeds), *_against_theirs(by, seeds)]


def _name(row: Row) -> str:
    return str(row["case"])


def _against_the_line(by: Mapping[tuple[str, int], Row], seeds: Sequence[int]) -> Iterator[Verdict]:
    for case in CASES:
        names = (case.name, *LINE)
        if case.bits is None or not all((name, seed) in by for name in names for seed in seeds):
            continue
        ratios = []
        for seed in seeds:
            mixed, low, high = (by[name, seed] for name in names)
            share = (mixed["bits"] - low["bits"]) / (high["bits"] - low["bits"])
            if not 0 <= share <= 1:
                break
            ratios.append(mixed["divergence"] / ((1 - share) * low["divergence"] + share * high["divergence"]))
        else:
            yield Verdict(f"{case.name} against the line from {LINE[0]} to {LINE[1]}", tuple(ratios), case.name)


def _against_theirs(by: Mapping[tuple[str, int], Row], seeds: Sequence[int]) -> Iterator[Verdict]:
    """The best of ours of no more bits in the mean, chosen once for all seeds."""
    ours = [case for case in CASES if not case.is_theirs and all((case.name, seed) in by for seed in seeds)]
    for case in CASES:
        if not case.is_theirs or not all((case.name, seed) in by for seed in seeds):
            continue
        small = [each for each in ours if _mean(by, each, seeds, "bits") <= _mean(by, case, seeds, "bits") + HEAD_BITS]
        if not small:
            continue
        best = min(small, key=lambda each: _mean(by, each, seeds, "divergence"))
        ratios = (by[best.name, seed]["divergence"] / by[case.name, seed]["divergence"] for seed in seeds)
        yield Verdict(f"ours of no more bits against {case.name}", tuple(ratios), best.name)


def _mean(by: Mapping[tuple[str, int], Row], case: Case, seeds: Sequence[int], key: str) -> float:
    return sum(float(by[case.name, seed][key]) for seed in seeds) / len(seeds)
