"""One machine as `expertier calibrate` measured it: budgets and rates, and the same as a cluster of one node."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size, parse_bytes

from ..contract.cluster import Cluster
from ..contract.tier_spec import CpuTier, Tiers


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Budgets for experts in bytes, bandwidths in bytes per second.

    Args:
        gpu_bytes, cpu_bytes: room for experts; 0 puts none there.
        hbm_bytes_per_s: reads of the GPU's memory; 0 means that the machine has no GPU.
        dram_bytes_per_s: reads of host memory, and so of experts that the CPU computes.
        pcie_bytes_per_s: copies from host memory to the GPU; 0 means that nothing is fetched.
        ssd_bytes_per_s: reads from the SSD.
        cpu_computes: whether experts in host memory may be computed there; else they are fetched.

    Raises:
        ValueError: if a needed rate is not positive, a budget is negative, or GPU memory is given without a GPU.
    """

    gpu_bytes: float
    cpu_bytes: float
    dram_bytes_per_s: float
    ssd_bytes_per_s: float
    hbm_bytes_per_s: float = 0.0
    pcie_bytes_per_s: float = 0.0
    cpu_computes: bool = True

    def __post_init__(self) -> None:
        for name in ("dram_bytes_per_s", "ssd_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.hbm_bytes_per_s < 0 or self.pcie_bytes_per_s < 0:
            raise ValueError(f"rates must not be negative; got {self.hbm_bytes_per_s} and {self.pcie_bytes_per_s}")
        if self.gpu_bytes < 0 or self.cpu_bytes < 0:
            raise ValueError(f"budgets must not be negative; got {self.gpu_bytes} and {self.cpu_bytes} bytes")
        if self.gpu_bytes and not self.has_gpu:
            raise ValueError(
                f"{format_size(self.gpu_bytes)} of GPU memory were asked for, and the hardware file has no GPU "
                "(gpu_bytes_per_s is 0); use --gpu-memory 0, or calibrate on the machine with the GPU"
            )
        if not self.cpu_computes and not (self.has_gpu and self.pcie_bytes_per_s):
            raise ValueError("experts must be computed on the CPU where there is no GPU that they could be fetched to")

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU at all."""
        return self.hbm_bytes_per_s > 0

    def seconds_per_byte(self) -> tuple[float, float, float]:
        """Cost of one use of one byte in each tier; infinite for a GPU that is not there."""
        gpu = 1 / self.hbm_bytes_per_s if self.has_gpu else float("inf")
        ways = [1 / self.dram_bytes_per_s] if self.cpu_computes else []
        if self.has_gpu and self.pcie_bytes_per_s:
            ways.append(1 / self.pcie_bytes_per_s)
        return gpu, min(ways), 1 / self.ssd_bytes_per_s + min(ways)


def load_machine(path: str | os.PathLike[str], *, gpu_memory: object = 0, cpu_memory: object = 0) -> Machine:
    """Bandwidths from a `hardware.toml`, budgets from the caller.

    Args:
        path: TOML as `expertier calibrate` writes it; other keys are refused.
        gpu_memory, cpu_memory: bytes for experts, or text such as 8GiB (8G is the same).

    Raises:
        ValueError: if the file is not such a file, or GPU memory is asked for on a machine without a GPU.
    """
    rates = Hardware.load(Path(path))
    return Machine(
        gpu_bytes=parse_bytes(gpu_memory),
        cpu_bytes=parse_bytes(cpu_memory),
        hbm_bytes_per_s=rates.gpu_bytes_per_s,
        dram_bytes_per_s=rates.memory_bytes_per_s,
        pcie_bytes_per_s=rates.pcie_bytes_per_s,
        ssd_bytes_per_s=rates.disk_bytes_per_s,
    )


def machine_cluster(machine: Machine, of: Cluster, tiers: Tiers | None = None) -> Cluster:
    """The machine as a cluster of one node with one GPU, which has no memory where there is no GPU.

    Args:
        machine: budgets and rates.
        of: a cluster of one GPU whose other settings are kept.
        tiers: how tiers are used; None is one token per step, one transfer after the other.
    """
    chosen = tiers or Tiers(overlap=False)
    streams = machine.has_gpu and machine.pcie_bytes_per_s > 0
    one = np.ones(1)
    return replace(
        of,
        memory_bytes_G=one * machine.gpu_bytes,
        hbm_bytes_per_s_G=one * machine.hbm_bytes_per_s,
        flops_G=one * np.inf,
        dram_bytes_M=one * machine.cpu_bytes,
        dram_bytes_per_s_M=one * machine.dram_bytes_per_s,
        ssd_bytes_M=one * np.inf,
        ssd_bytes_per_s_M=one * machine.ssd_bytes_per_s,
        pcie_bytes_per_s_M=one * (machine.pcie_bytes_per_s if streams else 0.0),
        cpu_bytes_per_s_M=one * (machine.dram_bytes_per_s if machine.cpu_computes else 0.0),
        cpu_flops_M=one * np.inf,
        tiers=chosen.model_copy(update={"cpu": CpuTier(compute=machine.cpu_computes, stream=streams)}),
    )
