"""The default policy: which expert will be used again soonest, learned while the model runs."""

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from .policies import access, evict_lowest, expect_room


class LearnedReuse:
    """Evicts the expert with the least expected use soon, as a linear model that is learned while it runs says.

    Inputs are the recent frequencies of all experts of the layer at four speeds, so that experts which tend to come
    together are known; the target is DISCOUNT to the power of the tokens until the next use, which is what Belady ranks
    by. The model starts as a plain decayed frequency and is pulled towards what ridge regression finds, once per
    block of tokens; blocks are longer where there are more keys, because solving takes longer there.

    Args:
        capacity: keys it can hold.
        num_keys: keys there are; past `MOST_KEYS` the model is not trained and stays the decayed frequency.
    """

    DECAYS, START, DISCOUNT = (0.3, 0.7, 0.92, 0.99), 2, 0.65
    """Share of a frequency that is left after one token: half-lives of 0.6, 2, 8 and 69 tokens. START is the place of
    the one that ranks until something is learned. Chosen on rows 20,000 to 32,000 of a GPT-OSS-20B trace and judged on
    other rows (experiments/records/2026-11-29_cache-policies); no other model was tried."""
    LEAST_BLOCK, BLOCK_PER_KEY, HORIZON, RIDGE, MOST_KEYS = 128, 4, 40, 1e-2, 128
    """Tokens between two fits (at least, and per key: solving costs more with more keys); tokens after which a use
    counts as never (0.65^40 is nothing); pull towards the start; most keys of which a fit is quick enough to decode by.
    Chosen with DECAYS, on the same rows."""

    def __init__(self, capacity: int, num_keys: int) -> None:
        expect_room(capacity)
        self.capacity, self._num_keys = capacity, num_keys
        self._block = max(self.LEAST_BLOCK, self.BLOCK_PER_KEY * num_keys)
        self._resident: set[int] = set()
        self._decay = np.array(self.DECAYS, np.float64)[:, None]
        self._input = np.append(np.zeros(len(self.DECAYS) * num_keys), 1.0)
        self._frequency = self._input[:-1].reshape(len(self.DECAYS), num_keys)
        self._score: np.ndarray | None = None
        self._model: NDArray[np.floating] | None = None
        self._inputs: list[np.ndarray] = []
        self._demands: list[Sequence[int]] = []
        self._num_learned = 0
        self._learns = num_keys <= self.MOST_KEYS
        if self._learns:
            self._begin_learning()

    def _begin_learning(self) -> None:
        """Matrices of inputs by keys: at 1,024 keys, which are too many, they would take 8 MB of each layer at once."""
        num_keys = self._num_keys
        self._start = np.zeros((len(self._input), num_keys))
        self._start[self.START * num_keys : (self.START + 1) * num_keys] = np.eye(num_keys)
        self._gram = np.zeros((len(self._start), len(self._start)))
        # as `_gram`, memory that is taken when it is written to; `zeros_like` would take it for every layer at once
        self._moment = np.zeros(self._start.shape)

    def __contains__(self, key: int) -> bool:
        return key in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def resident(self) -> Collection[int]:
        return self._resident

    def demand(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> None:
        """One token uses `keys`."""
        self._frequency *= self._decay
        self._frequency[:, keys] += 1 - self._decay
        self._score = None
        if self._learns:
            self._inputs.append(self._input.copy())
            self._demands.append(keys)
            if len(self._inputs) == self._block + self.HORIZON:
                self._learn()

    def insert(self, key: int) -> None:
        """Make `key` resident; there must be room."""
        if len(self._resident) >= self.capacity:
            raise RuntimeError(f"cache of {self.capacity} is full; evict before inserting {key}")
        self._resident.add(key)

    def evict(self, pinned: Collection[int] = ()) -> int:
        """Remove and return the least promising key; keys in `pinned` go only when there is no other."""
        return evict_lowest(self._resident, pinned, self.rank)

    def discard(self, key: int) -> None:
        """Forget that `key` is resident, for example because reading it failed."""
        self._resident.discard(key)

    def rank(self, key: int) -> tuple[float, float]:
        """Expected use soon, and how recent the last use is."""
        if self._score is None:
            self._score = self._frequency[self.START] if self._model is None else self._input @ self._model
        return float(self._score[key]), float(self._frequency[0, key])

    def access(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> int:
        """One token at one layer: look all keys up, then insert them; gives the number of hits."""
        return access(self, keys, next_uses, weights)

    def _learn(self) -> None:
        """Add the oldest block, whose future is known by now, and solve for the model again."""
        uses = np.zeros((len(self._demands), self._num_keys))
        for row, keys in enumerate(self._demands):
            uses[row, keys] = 1
        coming = np.zeros_like(uses)
        for row in range(len(uses) - 2, -1, -1):
            coming[row] = np.where(uses[row + 1], 1.0, self.DISCOUNT * coming[row + 1])
        inputs = np.stack(self._inputs[: self._block])
        self._num_learned += self._block
        pull = self.RIDGE * self._num_learned
        with one_thread()():
            self._gram += inputs.T @ inputs
            self._moment += inputs.T @ coming[: self._block]
            left = self._gram + pull * np.eye(len(self._gram))
            self._model = np.linalg.solve(left, self._moment + pull * self._start)
        del self._inputs[: self._block], self._demands[: self._block]


@functools.cache
def one_thread() -> Callable[[], AbstractContextManager[object]]:
    """Contexts in which NumPy's products run on one thread; they change nothing without threadpoolctl.

    The matrices are small, and the other threads of OpenBLAS would wait for cores that torch and the readers have:
    with two busy cores a fit took 190 ms with them, and 4 ms without.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return nullcontext
    # OpenBLAS alone: a limit of all would reach MKL, with which torch multiplies in other threads
    pools = ThreadpoolController().select(internal_api="openblas")
    return functools.partial(pools.limit, limits=1)
