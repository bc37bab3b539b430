"""Alerts while a run goes on: experts that nobody visits, and routers that use only a few of their experts.

Shapes: L MoE layers, E experts.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 20
"""Steps that an alert looks back on: a batch of 1,024 tokens leaves one of 64 experts out by chance, twenty do not."""
COLLAPSED_SHARE = 0.25
"""A layer that uses fewer of its experts than this counts as collapsed; balanced routers use above 0.8."""
COLLAPSED_PER_CHOICE = 1.25
"""So does one that uses hardly more experts than every single token visits."""


class Alarm:
    """Looks at the loads of each step, and says a trouble when it begins and when it ends.

    Args:
        model: settings of the model; says how many experts a token visits.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._top_k = model.get("num_experts_per_tok", 2)
        self._loads: deque[NDArray[np.float64]] = deque(maxlen=WINDOW)
        self._dead: list[set[int]] = []
        self._collapsed: set[int] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """What is to be said after a step, a line each; nothing before WINDOW steps.

        Args:
            row: of the metrics, with `load` as shares [L, E] if the model has routers.
        """
        if not row.get("load"):
            return []
        self._loads.append(np.array(row["load"], np.float64))
        if len(self._loads) < WINDOW:
            return []
        share_LE = np.mean(self._loads, axis=0)
        return [*self._about_dead(share_LE), *self._about_collapse(share_LE)]

    def _about_dead(self, share_LE: NDArray[np.float64]) -> list[str]:
        now = [set(np.flatnonzero(share_E == 0).tolist()) for share_E in share_LE]
        before = self._dead or [set() for _ in now]
        self._dead, lines = now, []
        for layer, (dead, known) in enumerate(zip(now, before, strict=True)):
            if dead - known:
                lines.append(f"layer {layer}: no token in {WINDOW} steps for experts {_listed(dead - known)}")
            if known and not dead:
                lines.append(f"layer {layer}: all experts are visited again")
        return lines

    def _about_collapse(self, share_LE: NDArray[np.float64]) -> list[str]:
        E = share_LE.shape[1]
        least = max(COLLAPSED_SHARE * E, COLLAPSED_PER_CHOICE * self._top_k)
        used_L = used_experts(share_LE)
        now = set(np.flatnonzero(used_L < least).tolist()) if least < E else set()
        lines = [f"layer {n}: the router collapses, it uses {used_L[n]:.1f} of {E} experts" for n in now]
        lines = [line for n, line in zip(now, lines, strict=True) if n not in self._collapsed]
        lines += [f"layer {n}: the router uses {used_L[n]:.1f} of {E} experts again" for n in self._collapsed - now]
        self._collapsed = now
        return lines


def used_experts(share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L]: how many experts are used, as the exponential of the loads' entropy; E where all are used alike."""
    share_LE = share_LE / np.maximum(share_LE.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    log_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return np.exp(-(share_LE * log_LE).sum(axis=1))


def _listed(numbers: set[int]) -> str:
    """The first few of them."""
    most = 8  # fits a line
    text = ", ".join(map(str, sorted(numbers)[:most]))
    return text if len(numbers) <= most else f"{text} and {math.floor(len(numbers) - most)} more"
