"""How fast will it decode, and what limits it? Bytes over bandwidths. Without torch.

Source: the bound of MoE-Lens (arXiv:2504.09345) and MoE-Lightning's hierarchical roofline (arXiv:2411.11217), reduced
to one sequence on one machine with a disk below it.
"""

from dataclasses import dataclass
from math import comb

from routing.ground.hardware import Hardware

MISS_EXPONENT = 3.2
"""With a share `s` of the experts in memory, `(1 - s) ** 3.2` of the accesses miss. The curve goes through the two
points that peers and traces report: 60 % hits with a quarter of the experts, 89 % (reported: 90 %) with half of them.
It is 0 without slots and 1 with all of them. On the GPT-OSS-20B trace of experiments/records/2026-11-29_cache-policies
a quarter gives 65 to 67 % with `lru` and 71 to 73 % with `learned`; other models were not compared."""


MISS_SHARE = 0.5
"""What an expert that is not in memory costs besides its bytes, in parts of what a layer costs besides weights: asking
for it, waking up, making room. Where a layer cost 0.63 ms, it was 0.2 to 0.5 ms, by the differences between predicted
and measured steps of `bench forecast` with one sequence and four. That run has no record."""


@dataclass(frozen=True, kw_only=True)
class DecodeWork:
    """What one decoded token needs.

    Args:
        num_layers: MoE layers.
        experts_per_layer: experts that a token uses in each of them.
        expert_bytes: one expert.
        resident_bytes: weights outside experts that every token reads.
        hit_rate: share of experts that are in memory when they are asked for.
        streamed_bytes: of `resident_bytes`, those that are read from the disk for every token.
    """

    num_layers: int
    experts_per_layer: int
    expert_bytes: int
    resident_bytes: int
    hit_rate: float
    streamed_bytes: int = 0

    @property
    def missed_bytes(self) -> float:
        return self.num_layers * self.experts_per_layer * (1 - self.hit_rate) * self.expert_bytes

    @property
    def active_bytes(self) -> float:
        return self.num_layers * self.experts_per_layer * self.expert_bytes + self.resident_bytes


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds per decoded token.

    `disk_s` and `compute_s` are what each resource needs on its own; `token_s` is what is expected, `floor_s` what
    would remain if they overlapped fully.
    """

    disk_s: float
    compute_s: float
    token_s: float

    @property
    def floor_s(self) -> float:
        return max(self.disk_s, self.compute_s)

    @property
    def binds(self) -> str:
        return "disk" if self.disk_s >= self.compute_s else "memory"


def predict_decode(work: DecodeWork, hardware: Hardware, *, rate: float, is_cached: bool = False) -> Prediction:
    """Time of one token.

    Within a layer the hits are computed while the misses load, and each miss once it is there, the last one after all
    reading. How many of a layer's experts miss is taken as binomial, because a layer without misses leaves the disk
    idle. Everything outside experts does not overlap with reading experts; it does with reading streamed layers.

    Args:
        work: bytes that a token needs.
        hardware: rates of this machine.
        rate: stored bytes per second that the products of one token read.
        is_cached: whether reads come out of the page cache.
    """
    disk_rate = hardware.cached_bytes_per_s if is_cached else hardware.disk_bytes_per_s
    dense_s = work.resident_bytes / rate + work.num_layers * hardware.layer_s
    outside = max(dense_s, work.streamed_bytes / disk_rate)
    experts = (work.active_bytes - work.resident_bytes) / rate
    layer = _layer_seconds(work, miss_seconds(work.expert_bytes, disk_rate, hardware.layer_s), work.expert_bytes / rate)
    return Prediction(
        disk_s=(work.missed_bytes + work.streamed_bytes) / disk_rate,
        compute_s=dense_s + experts,
        token_s=outside + work.num_layers * layer,
    )


def _layer_seconds(work: DecodeWork, read_s: float, compute_s: float) -> float:
    """The experts of one layer, over the number of misses, given the seconds of reading and of computing one."""
    top_k, seconds = work.experts_per_layer, 0.0
    for misses in range(top_k + 1):
        chance = comb(top_k, misses) * (1 - work.hit_rate) ** misses * work.hit_rate ** (top_k - misses)
        seconds += chance * layer_call_seconds(misses, read_s, top_k * compute_s, compute_s)
    return seconds


def miss_seconds(expert_bytes: int, disk_rate: float, layer_s: float) -> float:
    """From asking for an expert that is not in memory until it is there.

    Args:
        expert_bytes: stored bytes of it.
        disk_rate: bytes per second.
        layer_s: what a layer costs besides weights.
    """
    return expert_bytes / disk_rate + MISS_SHARE * layer_s


def layer_call_seconds(misses: int, read_s: float, computing_s: float, last_s: float) -> float:
    """One call of one layer's experts: all that was read but the last is computed while the others are read.

    Args:
        misses: experts that are read.
        read_s: seconds of reading one.
        computing_s: seconds of computing all experts of the call.
        last_s: of them, those of the expert that lands last.
    """
    if not misses:
        return computing_s
    return max(misses * read_s, computing_s - last_s) + last_s


def expected_hit_rate(share: float, top_k: int, num_experts: int) -> float:
    """Hit rate to expect without a trace. Use a trace of the model itself for anything that matters.

    Args:
        share: of the experts, 0 to 1, that fit in memory.
        top_k, num_experts: without a choice (K >= E) the hit rate is the share itself.
    """
    if share >= 1:
        return 1.0
    if num_experts <= top_k:
        return share
    return 1 - (1 - share) ** MISS_EXPONENT
