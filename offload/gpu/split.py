"""Misses that lie in RAM: over the wire to the GPU, or computed where they are? Both at once, by measured rates.

Without torch. Sources: the rule of Fiddler (arXiv:2402.07033) and the split of FreeToken (arXiv:2608.16157). Unlike
there, rates are measured while the model runs, because rates of an idle machine mislead.
"""

from collections.abc import Sequence

PROBE_EVERY = 64
"""Splits, so two or three tokens of a model with 24 layers. A probe costs at most one expert on the slower side;
without probes a rate that was measured in a slow moment would never be corrected. Other values were not tried."""
HALF_LIFE = 16
"""Measurements after which one counts half: long enough to even out noise, short enough to follow a machine that slows
down within a token. Tried in simulation only (tests/test_offload_gpu_split.py)."""
WIRE_GUESS_BYTES_PER_S, CPU_GUESS_BYTES_PER_S = 12e9, 20e9
"""Half of what PCIe 4.0 x16 carries (copies of single experts do not fill it), and what two memory channels give to
plain reads. Both are replaced by the first measurement; wrong guesses cost one split."""


def split(wire_s: float, cpu_s: Sequence[float]) -> list[int]:
    """Which experts the CPU computes so that the wire and the CPU are both done as early as possible.

    All experts of a layer have the same size, so for any number of experts on the CPU the quickest ones are best.

    Args:
        wire_s: seconds that one expert takes to the GPU.
        cpu_s: seconds that each expert takes on the CPU.

    Returns:
        Places in `cpu_s`. At equal times the wire is taken, because it also fills the cache.
    """
    order = sorted(range(len(cpu_s)), key=cpu_s.__getitem__)
    best_s, best_count, spent_s = len(order) * wire_s, 0, 0.0
    for count, place in enumerate(order, start=1):
        spent_s += cpu_s[place]
        both_s = max((len(order) - count) * wire_s, spent_s)
        if both_s < best_s:
            best_s, best_count = both_s, count
    return order[:best_count]


class Rate:
    """Amount per second, where what was measured `HALF_LIFE` times ago counts half.

    Args:
        guess_per_s: what is believed before anything was measured.
    """

    def __init__(self, guess_per_s: float) -> None:
        self._guess_per_s = guess_per_s
        self._amount = self._seconds = 0.0

    @property
    def is_measured(self) -> bool:
        return self._seconds > 0

    @property
    def per_s(self) -> float:
        return self._amount / self._seconds if self._seconds > 0 else self._guess_per_s

    def note(self, amount: float, seconds: float) -> None:
        """One measurement."""
        kept = 0.5 ** (1 / HALF_LIFE)
        self._amount, self._seconds = kept * self._amount + amount, kept * self._seconds + seconds


class Splitter:
    """Splits the misses of one layer after the other, and learns from how long they took.

    A side that was not used for `PROBE_EVERY` splits gets one expert, so that no old measurement is believed forever.

    Args:
        wire_bytes_per_s, cpu_bytes_per_s: what is believed before anything was measured.
    """

    def __init__(
        self, wire_bytes_per_s: float = WIRE_GUESS_BYTES_PER_S, cpu_bytes_per_s: float = CPU_GUESS_BYTES_PER_S
    ) -> None:
        self.wire = Rate(wire_bytes_per_s)
        self._cpu_guess_per_s = cpu_bytes_per_s
        self._cpu: dict[int, Rate] = {}
        self._unused = {"wire": PROBE_EVERY, "cpu": PROBE_EVERY}

    def choose(self, expert_bytes: int, num_rows: Sequence[int]) -> list[int]:
        """Which of the missing experts the CPU computes.

        Args:
            expert_bytes: one expert.
            num_rows: rows of each.

        Returns:
            Places in `num_rows`.
        """
        if not num_rows:
            return []
        cpu_s = [self.cpu_seconds(expert_bytes, rows) for rows in num_rows]
        on_cpu = split(expert_bytes / self.wire.per_s, cpu_s)
        if not on_cpu and self._unused["cpu"] >= PROBE_EVERY:
            on_cpu = [min(range(len(cpu_s)), key=cpu_s.__getitem__)]
        elif len(on_cpu) == len(num_rows) and self._unused["wire"] >= PROBE_EVERY:
            on_cpu.pop()
        self._unused["cpu"] = 0 if on_cpu else self._unused["cpu"] + 1
        self._unused["wire"] = 0 if len(on_cpu) < len(num_rows) else self._unused["wire"] + 1
        return on_cpu

    def cpu_seconds(self, expert_bytes: int, rows: int) -> float:
        """Seconds of one expert on the CPU: as measured for so many rows, or scaled from the nearest that was."""
        wanted = rows.bit_length()
        if wanted in self._cpu:
            return expert_bytes / self._cpu[wanted].per_s
        fewer = [size for size in self._cpu if size < wanted]
        if fewer:
            return expert_bytes / self._cpu[max(fewer)].per_s * 2 ** (wanted - max(fewer))
        more = [size for size in self._cpu if size > wanted]
        return expert_bytes / (self._cpu[min(more)].per_s if more else self._cpu_guess_per_s)

    def note_cpu(self, expert_bytes: int, rows: int, seconds: float) -> None:
        """One expert was computed on the CPU."""
        self._cpu.setdefault(rows.bit_length(), Rate(self._cpu_guess_per_s)).note(expert_bytes, seconds)
