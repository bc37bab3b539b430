"""The degree of each step, from the seconds of earlier steps with as many rows: tried first, then the fastest.

The metrics of a run hold what a decision rests on, so a run that resumes decides as if nothing had happened, and the
report at its end is read from them.

Source: Hwang et al. 2023 (Tutel), arXiv:2206.03382, section 3.3: a dictionary from capacities, in buckets, to the
fastest way, which is found by trying each way once.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moe.parallel import Degree

from ..metrics import read_log
from ..run_folder import LOG_FILE

TRIALS = 3
"""Steps that each degree is tried for: the median of three forgives one that something else slowed, or the first."""
REMEMBERED = 9
"""Steps whose median counts, the last ones: what was measured long ago may no longer hold."""
BUCKETS_PER_OCTAVE = 4
"""Buckets while rows double: 19 % apart, so balancing moves a run through few of them."""


def bucket_of(rows: int) -> int:
    """Which bucket so many rows of the busiest process are in."""
    return round(BUCKETS_PER_OCTAVE * math.log2(max(rows, 1)))


def facts(degree: Degree, rows: int, seconds: float) -> dict[str, Any]:
    """What the metrics of a step say of its degree.

    Args:
        degree: under which the step reached its experts.
        rows: that the busiest process would compute if only tokens travelled, summed over layers.
        seconds: that the slowest process took.
    """
    return {"expert_degree": degree.expert, "parts": degree.parts, "busiest_rows": rows, "step_s": seconds}


class Timings:
    """What steps took under each degree, by buckets of rows.

    Args:
        degrees: to choose from, in an order that all processes share; one or more.
        log: metrics of steps that were done before, under any degrees and numbers of processes.
        processes: how many there are now.
    """

    def __init__(self, degrees: Sequence[Degree], log: Iterable[Mapping[str, Any]] = (), *, processes: int) -> None:
        self._degrees, self._bucket = degrees, 0
        self._seconds: dict[int, list[deque[float]]] = defaultdict(lambda: [deque(maxlen=REMEMBERED) for _ in degrees])
        for row in log:
            if row.get("processes") == processes:
                self.note(row)

    def choose(self) -> int:
        """The degree of the next step, by its place: rows will be about as many as in the last one."""
        taken = self._seconds[self._bucket]
        fewest = min(map(len, taken))
        if fewest < TRIALS:
            return next(place for place, seconds in enumerate(taken) if len(seconds) == fewest)
        return min(range(len(taken)), key=lambda place: median(taken[place]))

    def note(self, row: Mapping[str, Any]) -> None:
        """A step was done; its metrics have `facts`, or it counts for nothing."""
        if "expert_degree" not in row:
            return
        degree = Degree(expert=row["expert_degree"], parts=row["parts"])
        self._bucket = bucket_of(row["busiest_rows"])
        if degree in self._degrees:
            self._seconds[self._bucket][self._degrees.index(degree)].append(row["step_s"])


@dataclass(frozen=True, kw_only=True)
class Taken:
    """How often a degree was taken in a bucket of rows.

    Args:
        rows: of the busiest process, in the middle of the bucket.
        degree: which.
        processes: that did the steps together.
        steps: how many.
        seconds: of a step, the median.
    """

    rows: int
    degree: Degree
    processes: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        halves = ", woven in halves" if self.degree.parts > 1 else ""
        return (
            f"about {self.rows} rows: data={self.processes // self.degree.expert},expert={self.degree.expert}{halves}: "
            f"{self.steps} steps of {self.seconds:.3f} s"
        )


def taken(run: Path) -> list[Taken]:
    """The degrees of a run, from its metrics; by rows, the most frequent first."""
    seconds: dict[tuple[int, Degree, int], list[float]] = defaultdict(list)
    for row in read_log(run / LOG_FILE):
        if "expert_degree" in row:
            degree = Degree(expert=row["expert_degree"], parts=row["parts"])
            seconds[bucket_of(row["busiest_rows"]), degree, row["processes"]].append(row["step_s"])
    frequent = Counter({key: len(values) for key, values in seconds.items()}).most_common()
    return [
        Taken(
            rows=round(2 ** (bucket / BUCKETS_PER_OCTAVE)),
            degree=degree,
            processes=processes,
            steps=count,
            seconds=median(seconds[bucket, degree, processes]),
        )
        for (bucket, degree, processes), count in sorted(frequent, key=lambda found: found[0][0])
    ]
