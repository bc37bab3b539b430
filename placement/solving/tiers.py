"""Tiers of one machine: which experts live on the GPU, in host memory, on the SSD, by a latency model of decoding.

One decode step reads, at each layer, the token's K experts. An expert costs, per use,
  GPU   bytes / HBM bandwidth,
  CPU   the cheaper of computing there (bytes / DRAM bandwidth) and fetching it (bytes / PCIe bandwidth),
  SSD   bytes / SSD bandwidth (it is read, then used as from the CPU).
Experts of a token add up within a layer, layers add up: expected seconds per token = sum over (layer, expert) of
probability * cost(tier). With equal sizes that is solved exactly by frequency; `robust` counts the worst scenario per
expert instead of the mean. Sizes per layer may differ: then it is a knapsack, taken by frequency per byte.
Shapes: L layers, E experts.
"""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routing.ground.quantity import parse_bytes, parse_bytes_per_s

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..objectives import find_objective

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
GPU, CPU, SSD = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Budgets in bytes for experts, bandwidths in bytes per second; 0 bytes means that the tier is not there."""

    gpu_bytes: float
    cpu_bytes: float
    hbm_bytes_per_s: float
    dram_bytes_per_s: float
    pcie_bytes_per_s: float
    ssd_bytes_per_s: float
    cpu_computes: bool = True

    def __post_init__(self) -> None:
        for name in ("hbm_bytes_per_s", "dram_bytes_per_s", "pcie_bytes_per_s", "ssd_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.gpu_bytes < 0 or self.cpu_bytes < 0:
            raise ValueError(f"budgets must not be negative; got {self.gpu_bytes} and {self.cpu_bytes}")

    def seconds_per_byte(self) -> tuple[float, float, float]:
        """Cost of one use of one byte in each tier."""
        fetch = 1 / self.pcie_bytes_per_s
        cpu = min(fetch, 1 / self.dram_bytes_per_s) if self.cpu_computes else fetch
        return 1 / self.hbm_bytes_per_s, cpu, 1 / self.ssd_bytes_per_s + cpu


def load_machine(path: str | os.PathLike[str], *, gpu_memory: object = 0, cpu_memory: object = 0) -> Machine:
    """Bandwidths from a `hardware.toml` (as `expertier calibrate` writes it), budgets from the caller.

    Args:
        path: TOML with `[ssd]`, `[ram]`, `[pcie]`, `[gpu]` tables of `bytes_per_s`, or those keys with the table's name
            in front (`ssd_bytes_per_s`) anywhere.
        gpu_memory, cpu_memory: bytes for experts, or text such as 8GiB.

    Raises:
        ValueError: if the file is missing, is not TOML, or names no SSD and RAM bandwidth.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"hardware file {path}: no such file")
    try:
        flat = _flatten(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"hardware file {path}: not readable as TOML: {error}") from error
    rates = {name: _rate(flat, names) for name, names in _RATE_NAMES.items()}
    if missing := [name for name in ("ssd", "dram") if rates[name] is None]:
        raise ValueError(f"hardware file {path}: no {' and '.join(missing)} bandwidth; known keys: {_RATE_NAMES}")
    dram = rates["dram"] or 0.0
    return Machine(
        gpu_bytes=parse_bytes(gpu_memory),
        cpu_bytes=parse_bytes(cpu_memory),
        hbm_bytes_per_s=rates["hbm"] or max(dram, 1e12),
        dram_bytes_per_s=dram,
        pcie_bytes_per_s=rates["pcie"] or dram,
        ssd_bytes_per_s=rates["ssd"] or 0.0,
    )


def place_tiers(problem: Problem, machine: Machine, expert_bytes_L: Float, *, robust: bool = False) -> Plan:
    """The plan of one machine that minimises expected seconds per decoded token.

    Args:
        problem: loads of the experts; its cluster has one GPU.
        machine: budgets and bandwidths.
        expert_bytes_L: bytes of one expert of each layer.
        robust: use each expert's largest share over the scenarios.

    Returns:
        A plan with `tier_LE`; its metadata holds `seconds_per_token` of the model.

    Raises:
        ValueError: if the problem's cluster has more than one GPU or the sizes do not fit the layers.
    """
    if problem.num_gpus != 1:
        raise ValueError(f"tiers are for one machine with one GPU; the cluster has {problem.num_gpus} GPUs")
    if expert_bytes_L.shape != (problem.num_layers,) or not np.all(expert_bytes_L > 0):
        raise ValueError(f"expert_bytes_L must be {problem.num_layers} positive sizes; got {expert_bytes_L.tolist()}")
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


def tier_seconds(use_LE: Float, tier_LE: Integer, machine: Machine, expert_bytes_L: Float) -> float:
    """Expected seconds per decoded token of the experts.

    Args:
        use_LE: expected uses of each expert per token (K * share).
        tier_LE: 0 GPU, 1 CPU, 2 SSD.
        machine, expert_bytes_L: as for `place_tiers`.
    """
    cost = np.array(machine.seconds_per_byte())
    return float((use_LE * cost[tier_LE] * expert_bytes_L[:, None]).sum())


_RATE_NAMES = {
    "ssd": ("ssd_bytes_per_s", "ssd_read_bytes_per_s", "disk_bytes_per_s"),
    "dram": ("dram_bytes_per_s", "ram_bytes_per_s", "memory_bytes_per_s", "cpu_bytes_per_s"),
    "pcie": ("pcie_bytes_per_s", "host_to_device_bytes_per_s"),
    "hbm": ("hbm_bytes_per_s", "gpu_bytes_per_s"),
}


def _flatten(value: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat |= _flatten(entry, f"{prefix}{name}_")
        else:
            flat[f"{prefix}{name}"] = entry
    return flat


def _rate(flat: dict[str, object], names: tuple[str, ...]) -> float | None:
    for key, value in flat.items():
        if any(key == name or key.endswith("_" + name) for name in names):
            return parse_bytes_per_s(value)
    return None
