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

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import Certificate
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..tiers.layout import OBJECTIVE, named_multipliers, plan_of, scenario_seconds
from ..tiers.model import tier_model
from ..tiers.relaxation import relax
from .machine import Machine, load_machine, machine_cluster

__all__ = ["Machine", "choose_tiers", "load_machine", "place_tiers", "tier_counts", "tier_seconds"]

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
# codes of the plan file, fastest first
GPU, CPU, SSD = 0, 1, 2
CERTIFICATE_S = 30.0  # at most, for the bound; 58 x 256 took 3 s


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
    on_machine = replace(problem, cluster=machine_cluster(machine, problem.cluster))
    plan = _certified(on_machine, tier_LE, expert_bytes_L)
    return replace(plan, metadata={**plan.metadata, "seconds_per_token": seconds})


def _certified(problem: Problem, tier_LE: Integer, expert_bytes_L: Float) -> Plan:
    """The plan of the tiers, each served in the quicker way, with the bound of the relaxation."""
    began = time.perf_counter()
    model = tier_model(problem, expert_bytes_L)
    cost_LEY = np.stack([model.chain_costs_WEYH(layer).max(axis=3).sum(axis=0) for layer in range(len(tier_LE))])
    places = np.array([("gpu", "host", "ssd").index(way.place) for way in model.ways.ways])
    way_LE = np.where(tier_LE[:, :, None] == places, cost_LEY, np.inf).argmin(axis=2)
    relaxed = relax(model, CERTIFICATE_S)
    seconds = model.seconds(way_LE)
    certificate = Certificate(
        objective_name=OBJECTIVE,
        objective=seconds,
        bound=min(relaxed.bound, seconds),
        bound_name="relaxation",
        in_sample=dict(scenario_seconds(model, way_LE)),
        seconds=time.perf_counter() - began,
        dual=named_multipliers(model, relaxed.multipliers),
        data_bound=min(relaxed.bound, seconds),
    )
    return plan_of(problem, model, way_LE, certificate, "tiers")


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
