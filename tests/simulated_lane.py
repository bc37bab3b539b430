"""A device for tests: its two streams run late, and interleaved at random wherever no wait forbids it.

Memory of the device starts as NaN. So a kernel that does not wait for its weights, a copy that does not wait for the
kernel that reads its slot, and host memory that is written again too early all change results, for some seed.
"""

import random
from collections import deque

import torch


class SimulatedMark:
    """A place in a queue."""

    def __init__(self, lane):
        self._lane, self.is_done = lane, False

    def wait(self):
        self._lane.run_until(lambda: self.is_done)


class SimulatedCopy(SimulatedMark):
    """The end of a copy."""

    def __init__(self, lane, nbytes):
        super().__init__(lane)
        self.nbytes, self.seconds = nbytes, nbytes / 1e9


class SimulatedLane:
    """Two queues of work on CPU tensors.

    Args:
        seed: decides which queue goes first where both may.
        copy_share: how often a copy goes first; 0 holds copies back until something waits for them.
    """

    def __init__(self, seed=0, copy_share=0.5, pins=True):
        self.device = torch.device("cpu")
        self._random, self._copy_share, self._pins = random.Random(seed), copy_share, pins
        self._compute, self._copies = deque(), deque()
        self.pinned, self.limited_to, self.pool_bytes, self.num_copies = [], None, 0, 0
        self.peer_bytes = 0
        self.fail_at_copy = None

    def available_bytes(self):
        return 2 << 30

    def limit(self, nbytes):
        self.limited_to = nbytes

    def peak_bytes(self):
        return self.pool_bytes

    def pool(self, shape, dtype):
        memory = _garbage(shape, dtype)
        self.pool_bytes += memory.nbytes
        return memory

    def peer_pool(self, shape, dtype):
        memory = _garbage(shape, dtype)
        self.peer_bytes += memory.nbytes
        return memory

    def host(self, shape, dtype):
        return _garbage(shape, dtype)

    def pin(self, memory):
        if self._pins:
            self.pinned.append(memory.data_ptr())
        return self._pins

    def unpin(self, memory):
        self.pinned.remove(memory.data_ptr())

    def launch(self, work):
        self._compute.append(("run", work))

    def hand_over(self, work):
        found = []
        self.launch(lambda: found.append(work()))
        self.run_until(lambda: not self._compute)
        return found[0]

    def mark(self):
        mark = SimulatedMark(self)
        self._compute.append(("mark", mark))
        return mark

    def copy_in(self, pairs, after):
        if self.num_copies == self.fail_at_copy:
            self.fail_at_copy = None
            raise RuntimeError("the copy engine is on fire")
        self.num_copies += 1
        if after is not None:
            self._copies.append(("wait", after))
        for target, source in pairs:
            assert target.shape == source.shape
            assert target.dtype == source.dtype
            self._copies.append(("run", lambda target=target, source=source: target.copy_(source)))
        copy = SimulatedCopy(self, sum(source.nbytes for _, source in pairs))
        self._copies.append(("mark", copy))
        return copy

    def drain(self):
        self.run_until(lambda: not self._compute and not self._copies)

    def compute_after(self, copy):
        self._compute.append(("wait", copy))

    def run_until(self, is_reached):
        while not is_reached():
            queues = [queue for queue in (self._compute, self._copies) if queue and _is_ready(queue[0])]
            assert queues, "both streams wait for something that was never queued"
            if len(queues) == 2:
                queues = [self._copies if self._random.random() < self._copy_share else self._compute]
            kind, item = queues[0].popleft()
            if kind == "run":
                item()
            elif kind == "mark":
                item.is_done = True


def _garbage(shape, dtype):
    return torch.full(shape, torch.nan if dtype.is_floating_point else 101, dtype=dtype)


def _is_ready(entry):
    kind, item = entry
    return kind != "wait" or item.is_done
