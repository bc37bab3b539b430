"""How deep experts in levels are held while a model runs: what may be asked for, who is hot, what is read first.

Without torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from routing.ground.expect import expect_choice

STATIC = ("all", "auto")
"""Depths that are chosen when a model is loaded, and stay; so do numbers."""
RULES = ("weight", "hottest", "router")
"""Rules that choose depths while a model runs."""
WEIGHT_THRESHOLDS = (0.6, 0.9)
"""HOBBIT's for Mixtral (arXiv:2411.01433): 67 % of the experts that miss are read whole, 30 % in few bits, 3 % not."""
PASSED = re.compile(r"(\w+)(?::([0-9.,]+))?")


@dataclass(frozen=True)
class DepthChoice:
    """A rule with its numbers.

    Args:
        rule: one of RULES.
        thresholds: of `weight`: the sums of larger routing weights up to which an expert that misses is read whole, and
            up to which it is read at all; 0 to 1.
        num_hot: of `hottest`: experts of a layer that are held deep; None takes as many as memory has room for.
    """

    rule: str
    thresholds: tuple[float, float] = WEIGHT_THRESHOLDS
    num_hot: int | None = None

    @classmethod
    def named(cls, text: str) -> "DepthChoice | None":
        """What `text` says: a rule as `weight`, `weight:0.6,0.9`, `hottest`, `hottest:8` or `router`; else None.

        Raises:
            ValueError: if the rule takes other numbers.
        """
        found = PASSED.fullmatch(text)
        if found is None or found[1] not in RULES:
            return None
        rule, numbers = found[1], found[2]
        if numbers is None:
            return cls(rule)
        try:
            if rule == "weight":
                whole, few = map(float, numbers.split(","))
                if 0 <= whole <= few <= 1:
                    return cls(rule, thresholds=(whole, few))
            elif rule == "hottest" and int(numbers) > 0:
                return cls(rule, num_hot=int(numbers))
        except ValueError:
            pass
        raise ValueError(
            f"depth={text!r}: weight takes two sums of weights, 0 to 1, such as weight:0.6,0.9; hottest takes a number"
        )


def expect_depth(depth: int | str) -> None:
    """Refuse a depth that is neither chosen at loading nor a rule.

    Raises:
        ValueError: if so.
    """
    text = str(depth)
    if not text.isdecimal() and DepthChoice.named(text) is None:
        expect_choice(text, (*STATIC, *RULES, "a number of levels"), "depth")


class Heat:
    """How much each expert of a layer was used lately: rows, each counting less with every call that comes after it.

    Args:
        num_experts: of the layer, 1 or more.
    """

    KEPT = 0.98
    """Of an older call's rows with each call: half is forgotten after 34 tokens. Not tuned."""
    MOST = 1e30
    """Before it, numbers are divided again: rows grow instead of all sums shrinking, which would touch every expert."""

    def __init__(self, num_experts: int) -> None:
        self._heat_E = [0.0] * num_experts
        self._unit = 1.0

    def __getitem__(self, expert: int) -> float:
        """In rows of the last call."""
        return self._heat_E[expert] / self._unit

    def note(self, rows: Mapping[int, int]) -> None:
        """Count the rows that a call has of each expert."""
        self._unit /= self.KEPT
        for expert, count in rows.items():
            self._heat_E[expert] += count * self._unit
        if self._unit > self.MOST:
            self._heat_E = [heat / self._unit for heat in self._heat_E]
            self._unit = 1.0

    def hottest(self) -> list[int]:
        """Experts that were used at all, the hottest first."""
        used = [expert for expert, heat in enumerate(self._heat_E) if heat]
        return sorted(used, key=self._heat_E.__getitem__, reverse=True)


def hottest_first(wanted: Mapping[int, Sequence[tuple[int, int]]], heat: Heat) -> list[tuple[int, int]]:
    """The order in which levels of experts are read: hottest expert's bits first (D2MoE's HEBF).

    Each expert has a queue of levels, the coarsest first. Of all heads, that goes next which most rows wait for; of
    equal ones, that of the expert that was used most lately.

    Source: D2MoE (arXiv:2504.15299), section 4.

    Args:
        wanted: of each expert, its levels and the rows that wait for each, in ascending order of levels.
        heat: of the layer's experts.

    Returns:
        Experts and levels.
    """
    heads = [(-queue[0][1], -heat[expert], expert, 0) for expert, queue in wanted.items() if queue]
    heapify(heads)
    order = []
    while heads:
        _, cold, expert, place = heappop(heads)
        queue = wanted[expert]
        order.append((expert, queue[place][0]))
        if place + 1 < len(queue):
            heappush(heads, (-queue[place + 1][1], cold, expert, place + 1))
    return order
