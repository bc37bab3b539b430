"""Eviction by prediction: what the coming passes are expected to use stays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .policies import SearchedCache


class PredictedUse(SearchedCache):
    """Evicts the expert that is least expected, as a predictor of whole passes says; without one it is an LRU.

    An expectation is a running mean over tokens, because a pass that has just begun says little about the next ones.

    Args:
        capacity: keys it can hold.
        num_keys: keys there are.

    Source: He et al. 2024 (ExpertFlow), arXiv:2410.17954, section on the predictive cache; the mean is ours.
    """

    KEPT = 0.8
    """Share of the mean that one token leaves; 0.8 remembers about five tokens. Not tuned."""

    def __init__(self, capacity: int, num_keys: int) -> None:
        super().__init__(capacity)
        self._expected_E = np.zeros(num_keys)

    def expect(self, use_E: NDArray[np.floating[Any]]) -> None:
        """How likely each key is in the pass that begins, 0..1."""
        self._expected_E = self.KEPT * self._expected_E + (1 - self.KEPT) * use_E

    def rank(self, key: int) -> tuple[float, float]:
        return float(self._expected_E[key]), self._entry.get(key, (0.0, 0))[1]
