"""How fast a model will decode with a GPU tier, and what limits it: bytes over bandwidths. Without torch.

Source: as in cost.py, with one more tier.
"""

from dataclasses import dataclass

from routing.ground.hardware import Hardware

from ...memory.cost import DecodeWork


@dataclass(frozen=True, kw_only=True)
class GpuPrediction:
    """Seconds per decoded token; each resource on its own, and what is expected when a layer's misses come while its
    hits are computed. What the host needs to launch kernels is not in it."""

    disk_s: float
    wire_s: float
    gpu_s: float
    token_s: float

    @property
    def floor_s(self) -> float:
        return max(self.disk_s, self.wire_s, self.gpu_s)

    @property
    def binds(self) -> str:
        return {self.disk_s: "disk", self.gpu_s: "GPU memory", self.wire_s: "PCIe"}[self.floor_s]


def predict_gpu_decode(work: DecodeWork, gpu_hit_rate: float, hardware: Hardware) -> GpuPrediction:
    """Time of one token.

    Args:
        work: what a token needs; its hit rate is the share of experts that are in RAM or on the GPU.
        gpu_hit_rate: the share that is on the GPU.
        hardware: rates, with those of a GPU.

    Raises:
        ValueError: if the rates of a GPU were not measured.
    """
    if not (hardware.pcie_bytes_per_s and hardware.gpu_bytes_per_s):
        raise ValueError("this hardware file says nothing about a GPU; run `expertier calibrate` on the GPU machine")
    experts = work.num_layers * work.experts_per_layer * work.expert_bytes
    disk_s = work.missed_bytes / hardware.disk_bytes_per_s
    wire_s = experts * (1 - gpu_hit_rate) / hardware.pcie_bytes_per_s
    experts_s = experts / hardware.gpu_bytes_per_s
    outside_s = work.resident_bytes / hardware.gpu_bytes_per_s
    hits_s = experts_s * gpu_hit_rate
    token_s = outside_s + max(disk_s, wire_s, hits_s) + experts_s - hits_s
    return GpuPrediction(disk_s=disk_s, wire_s=wire_s, gpu_s=outside_s + experts_s, token_s=token_s)
