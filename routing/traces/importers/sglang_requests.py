"""Which request a row of SGLang's recorder belongs to, which the recorder does not write down.

A prefill names the lengths of its requests. A decode pass holds one row per running request, in the order of the
running batch: requests that end leave gaps that close, new ones follow at the end. So a row at position p continues the
first request in this order, behind that of the row before, that has come to position p.
"""

from dataclasses import dataclass


@dataclass(eq=False)
class _Running:
    request: int
    next_position: int
    is_decoding: bool = False


class RequestFinder:
    """Numbers requests of one data-parallel rank, pass by pass.

    `ambiguous` counts the rows that more than one running request could have continued.
    """

    def __init__(self, first: int = 0) -> None:
        self.count = first
        self.ambiguous = 0
        self._running: list[_Running] = []

    def prefill(self, lengths: list[int], positions: list[int]) -> list[int]:
        """Requests of the rows of a prefill, of which a chunk may continue the prompt of the last one.

        Args:
            lengths: rows of each request.
            positions: position of each row in its request.
        """
        requests: list[int] = []
        start = 0
        unfinished = [one for one in self._running if not one.is_decoding]
        decoding = [one for one in self._running if one.is_decoding]
        for length in lengths:
            first, start = positions[start], start + length
            # a pass may carry decode rows behind its prefills: one row each, of requests that decode already
            open_ones = unfinished + (decoding if length == 1 else [])
            running = next((one for one in open_ones if first and one.next_position == first), None)
            if running is None:
                running = self._begin(first)
            elif running.is_decoding:
                decoding.remove(running)
            else:
                unfinished.remove(running)
            running.next_position = first + length
            requests += [running.request] * length
        return requests

    def decode(self, positions: list[int]) -> list[int]:
        """Requests of the rows of a decode pass."""
        requests: list[int] = []
        still: list[_Running] = []
        place = 0
        for position in positions:
            fitting = [i for i in range(place, len(self._running)) if self._running[i].next_position == position]
            if fitting:
                self.ambiguous += self._is_unclear(fitting, len(positions), len(still))
                running, place = self._running[fitting[0]], fitting[0] + 1
            else:
                running = self._begin(position, listed=False)
            running.next_position, running.is_decoding = position + 1, True
            still.append(running)
            requests.append(running.request)
        # who has no row has ended; prompts that are still in chunks stay
        waiting = [one for one in self._running if not one.is_decoding and one not in still]
        self._running = still + waiting
        return requests

    def _is_unclear(self, fitting: list[int], rows: int, placed: int) -> bool:
        """More requests could be meant, and some must have ended, since fewer rows than requests are left."""
        left = len(self._running) - fitting[0]
        return len(fitting) > 1 and rows - placed < left

    def _begin(self, first: int, *, listed: bool = True) -> _Running:
        running = _Running(self.count, first)
        self.count += 1
        if listed:
            self._running.append(running)
        return running
