"""Streamed weights of a running model, lent to its modules one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...window.window import Streamed
from .changes import Changes


class LentGuests:
    """The holder of a window's guests; see `window.binding.Holder`.

    Args:
        window: reads them.
        changes: guards it.
    """

    def __init__(self, window: Streamed, changes: Changes) -> None:
        self._window, self._changes = window, changes

    @contextmanager
    def lend(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """The weights of a streamed guest, while it is computed; other threads wait meanwhile.

        Args:
            number: place in the window's plan.

        Raises:
            OSError: if reading fails.
            RuntimeError: if the model is called again within.
        """
        self._changes.enter_process()
        with self._changes.lock:
            with self._changes.within():
                weights = self._window.enter(number)
            turn = self._window.turn
            yield weights
            with self._changes.within():
                self._window.leave(turn)

    def begin(self) -> None:
        """Start to read streamed weights before a pass needs them."""
        with self._changes.within():
            self._window.begin()

    def expect_rows(self, rows: Mapping[int, Sequence[int]]) -> None:
        """Start to read rows of tables that a pass will look up.

        Args:
            rows: place in the window's plan -> numbers of different rows of that table.
        """
        with self._changes.within():
            for table, row_N in rows.items():
                self._window.expect_rows(table, row_N)

    def rows(self, table: int, row_N: Sequence[int]) -> torch.Tensor:
        """Rows of a streamed embedding, `[N, D]`.

        Args:
            table: place in the window's plan.
            row_N: numbers of the rows.
        """
        with self._changes.within():
            return self._window.rows(table, row_N)
