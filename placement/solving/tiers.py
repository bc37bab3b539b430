"""Tiers of one machine: which experts live on the GPU, in host memory, on the SSD, by a latency model of decoding.

One decode step reads, at each layer, the token's K experts. An expert costs, per use,
  GPU   bytes / HBM bandwidth,
  CPU   the cheaper of computing there (bytes / DRAM bandwidth) and fetching it to the GPU (bytes / PCIe bandwidth),
  SSD   bytes / SSD bandwidth (it is read, then used as from the CPU).
Experts of a token add up within a layer, layers add up: expected seconds per token = sum over (layer, expert) of
probability * cost(tier). With equal sizes that is solved exactly by frequency; `robust` counts the worst scenario per
expert instead of the mean. Sizes per layer may differ: then it is a knapsack, taken by frequency per byte.
Shapes: L layers, E experts.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size, parse_bytes

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..objectives import find_objective

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
# codes of the plan file, fastest first
GPU, CPU, SSD = 0, 1, 2


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


def place_tiers(problem: Problem, machine: Machine, expert_bytes: float | Float, *, robust: bool = False) -> Plan:
    """The plan of one machine that minimises expected seconds per decoded token.

    Args:
        problem: loads of the experts; its cluster has one GPU.
        machine: budgets and bandwidths; without a GPU nothing is put there.
        expert_bytes: bytes of one expert: one size, or [L] sizes.
        robust: use each expert's largest share over the scenarios.

    Returns:
        A plan with `tier_LE`; its metadata holds `seconds_per_token` of the model.

    Raises:
        ValueError: if the problem's cluster has more than one GPU or the sizes do not fit the layers.
    """
    if np.ndim(expert_bytes) and np.shape(expert_bytes) != (problem.num_layers,):
        raise ValueError(f"expert_bytes must be one size or {problem.num_layers}; got shape {np.shape(expert_bytes)}")
    if problem.num_gpus != 1:
        raise ValueError(f"tiers are for one machine with one GPU; the cluster has {problem.num_gpus} GPUs")
    expert_bytes_L = np.broadcast_to(np.asarray(expert_bytes, np.float64), (problem.num_layers,))
    if not np.all(expert_bytes_L > 0):
        raise ValueError(f"expert_bytes must be positive; got {expert_bytes_L.min()}")
    weight_WLE = problem.weight_WLE * problem.top_k
    use_LE = weight_WLE.max(axis=0) if robust else weight_WLE.mean(axis=0)
    tier_LE = choose_tiers(use_LE, machine, expert_bytes_L)
    seconds = tier_seconds(weight_WLE.mean(axis=0), tier_LE, machine, expert_bytes_L)
    everything = np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))
    return Plan(
        physical_to_logical_LP=everything,
        num_experts=problem.num_experts,
        cluster=problem.cluster,
        layer_ids=problem.layer_ids,
        hidden_layers=problem.hidden_layers,
        solver="tiers",
        objective_name=find_objective("balance").name,
        tier_LE=tier_LE,
        metadata={"seconds_per_token": seconds, "load": problem.load_WLE.mean(axis=0).tolist()},
    )


def choose_tiers(use_LE: Float, machine: Machine, expert_bytes_L: Float) -> Integer:
    """Fastest tier for the most used experts: exact for equal sizes (exchange argument), by frequency else.

    Seconds per byte are the same for all experts of a tier, so what a byte of fast memory saves is the frequency alone.
    """
    tier_LE = np.full(use_LE.shape, SSD)
    size_LE = np.broadcast_to(expert_bytes_L[:, None], use_LE.shape).ravel()
    order = np.argsort(-use_LE.ravel(), kind="stable")
    left = [machine.gpu_bytes, machine.cpu_bytes]
    for index in order.tolist():
        for tier in (GPU, CPU):
            if size_LE[index] <= left[tier]:
                left[tier] -= size_LE[index]
                tier_LE.ravel()[index] = tier
                break
    return tier_LE


def tier_counts(plan: Plan) -> list[int]:
    """How many experts are on the GPU, in host memory and on the SSD, over all layers."""
    if plan.tier_LE is None:
        raise ValueError("the plan has no tiers; it was not made by `expertier place tiers`")
    return [int((plan.tier_LE == tier).sum()) for tier in (GPU, CPU, SSD)]


def tier_seconds(use_LE: Float, tier_LE: Integer, machine: Machine, expert_bytes_L: Float) -> float:
    """Expected seconds per decoded token of the experts.

    Args:
        use_LE: expected uses of each expert per token (K * share).
        tier_LE: 0 GPU, 1 CPU, 2 SSD.
        machine, expert_bytes_L: as for `place_tiers`.
    """
    cost = np.array(machine.seconds_per_byte())
    if not machine.has_gpu and np.any(tier_LE == GPU):
        raise ValueError("the machine has no GPU, and the tiers put experts there")
    return float((use_LE * cost[tier_LE] * expert_bytes_L[:, None]).sum())
