"""Imbalance batch by batch, under the rule by which an engine chooses between copies.

A plan that is balanced on average may be far from it in every single batch, since a batch is of few domains.
uniform  every copy gets the same share of the batch.
static   each source GPU always uses one copy: its own, else one of its node, else any, in turn (SGLang `static`).
nearest  as static, but evenly over the copies that are as near.
lp       a linear programme per batch and layer minimises the fullest GPU (LPLB; SGLang `lp`).
The rows of shared experts, one per token each, are spread evenly, or fill up the emptiest GPUs (SGLang's waterfill).
Source: deepseek-ai/LPLB; sgl-project/sglang, pull requests 24515 and 19290.

Shapes: A batches, L layers, E experts, G GPUs, N rows of the programme's table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.cluster import Cluster, Dispatch
from ..contract.plan import Plan
from ..data.batches import count_rows_AE, spread, traffic_batches
from .dispatch import nearest_share_EG, share_EG

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
POLICIES = ("uniform", "static", "nearest", "lp")
MOST_BATCHES = 64  # evenly spaced over the traffic: lp takes some 3 ms for each and layer
TAIL = 0.1  # of the batches, whose mean stands for the 95th percentile and is smoother
LEAST_BATCHES = 8  # that a trace is cut into; fewer tell nothing of a tail
EPSILON = 1e-12  # loads below it are empty batches


@dataclass(frozen=True, kw_only=True)
class BatchImbalance:
    """Fullest over mean GPU of each batch, mean over layers.

    Args:
        mean: over batches.
        p95: value that 95 % of the batches do not exceed.
        worst: of all batches that were looked at.
        batches: how many were looked at.
    """

    mean: float
    p95: float
    worst: float
    batches: int


def batch_imbalance(
    plan: Plan,
    trace: RoutingTrace,
    tokens: int,
    policy: str = "uniform",
    *,
    shared: int = 0,
    fills: bool = False,
    most: int = MOST_BATCHES,
) -> BatchImbalance:
    """Judge a plan on batches of consecutive tokens.

    Args:
        plan: every expert on GPUs.
        trace: rows in traffic order; one token more than a batch is enough for one.
        tokens: of one batch over all GPUs; their sources are spread evenly.
        policy: one of POLICIES.
        shared: shared experts, each one row per token.
        fills: whether those rows go to the emptiest GPUs, or evenly to all.
        most: batches that are looked at.

    Raises:
        ValueError: if the trace is shorter than one batch or does not fit the plan.
    """
    value_AL = batch_imbalance_AL(plan, trace, tokens, policy, shared=shared, fills=fills, most=most)
    value_A = value_AL.mean(axis=1)
    return BatchImbalance(
        mean=float(value_A.mean()),
        p95=float(np.percentile(value_A, 95)),
        worst=float(value_A.max()),
        batches=len(value_A),
    )


def batch_imbalance_AL(
    plan: Plan,
    trace: RoutingTrace,
    tokens: int,
    policy: str,
    *,
    shared: int = 0,
    fills: bool = False,
    most: int = MOST_BATCHES,
) -> Float:
    """The same for each batch and layer; arguments as for `batch_imbalance`."""
    if trace.num_layers != plan.num_layers or trace.num_experts > plan.num_experts:
        raise ValueError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, "
            f"the plan {plan.num_layers} of {plan.num_experts}"
        )
    batch_AT = spread(traffic_batches(trace, tokens), most)
    found = np.ones((len(batch_AT), plan.num_layers))
    for layer in range(plan.num_layers):
        rows_AE = np.zeros((len(batch_AT), plan.num_experts))
        rows_AE[:, : trace.num_experts] = count_rows_AE(trace, batch_AT, layer)
        load_AG = loads_AG(plan.copies_LEG[layer], plan.cluster, rows_AE, policy)
        found[:, layer] = imbalance_A(load_AG, plan.cluster.speed_G, shared * tokens, fills=fills)
    return found


def tail_L(plan: Plan, trace: RoutingTrace, tokens: int) -> Float:
    """Mean imbalance over the worst tenth of the batches, per layer, under the plan's own dispatch."""
    value_AL = batch_imbalance_AL(plan, trace, batch_size(trace, tokens), policy_of(plan.dispatch))
    return tail_mean_L(value_AL)


def tail_mean_L(value_AL: Float) -> Float:
    """Mean over the worst tenth of the batches, one batch at least."""
    return np.asarray(np.sort(value_AL, axis=0)[-max(1, round(TAIL * len(value_AL))) :].mean(axis=0))


def policy_of(dispatch: Dispatch) -> str:
    """The rule of batches that a plan's dispatch means."""
    return "lp" if dispatch == "quota" else dispatch


def batch_size(trace: RoutingTrace, tokens: int) -> int:
    """Tokens of a batch, cut so that a short trace still has a few batches."""
    return max(1, min(tokens, trace.num_tokens // LEAST_BATCHES))


def loads_AG(copies_EG: NDArray[np.int16], cluster: Cluster, rows_AE: Float, policy: str) -> Float:
    """Rows that each GPU gets of each batch in one layer."""
    if policy == "lp":
        return np.stack([least_peak_G(copies_EG, rows_E, cluster.speed_G) for rows_E in rows_AE])
    if policy == "static":
        return np.asarray(rows_AE @ static_share_EG(copies_EG, cluster))
    if policy in ("uniform", "nearest"):
        return np.asarray(
            rows_AE @ share_EG(copies_EG, cluster, "nearest" if policy == "nearest" else "uniform", rows_AE[0])
        )
    raise ValueError(f"dispatch must be one of {', '.join(POLICIES)}; got {policy!r}")


def imbalance_A(load_AG: Float, speed_G: Float, shared_rows: float, *, fills: bool) -> Float:
    """Fullest over mean GPU in time; rows of shared experts are spread evenly, or poured into the emptiest GPUs."""
    total_A = load_AG.sum(axis=1) + shared_rows
    mean_A = total_A / speed_G.sum()
    own_AG = load_AG if fills else load_AG + shared_rows * speed_G / speed_G.sum()
    peak_A = np.maximum((own_AG / speed_G).max(axis=1), mean_A)
    return np.divide(peak_A, mean_A, out=np.ones(len(mean_A)), where=mean_A > EPSILON)


def static_share_EG(copies_EG: NDArray[np.int16], cluster: Cluster) -> Float:
    """Share of each expert's rows per GPU when source GPU i uses the i-th of the nearest copies, in turn."""
    G = cluster.num_gpus
    total_EG = np.zeros(copies_EG.shape)
    for source in range(G):
        near_EG = nearest_share_EG(copies_EG, cluster, source) > 0
        count_E = near_EG.sum(axis=1)
        place_EG = near_EG.cumsum(axis=1) - 1
        chosen_EG = near_EG & (place_EG == (source % np.maximum(count_E, 1))[:, None])
        total_EG += chosen_EG
    return total_EG / G


def least_peak_G(copies_EG: NDArray[np.int16], rows_E: Float, speed_G: Float) -> Float:
    """Loads of the GPUs after the linear programme that minimises the fullest one; only replicated experts are free."""
    from scipy.optimize import linprog

    holds_EG = copies_EG > 0
    is_free_E = (holds_EG.sum(axis=1) > 1) & (rows_E > 0)
    fixed_G = rows_E[~is_free_E] @ (holds_EG[~is_free_E] / np.maximum(holds_EG[~is_free_E].sum(axis=1), 1)[:, None])
    free = np.flatnonzero(is_free_E)
    if not len(free):
        return np.asarray(fixed_G)
    place, gpu_N = np.nonzero(holds_EG[free])
    N, G = len(gpu_N), len(speed_G)
    unit = float(rows_E.sum())
    upper, sums = np.zeros((G, N + 1)), np.zeros((len(free), N + 1))
    upper[gpu_N, np.arange(N)] = 1
    upper[:, N] = -speed_G
    sums[place, np.arange(N)] = 1
    cost = np.zeros(N + 1)
    cost[N] = 1
    done: Any = linprog(cost, A_ub=upper, b_ub=-fixed_G / unit, A_eq=sums, b_eq=rows_E[free] / unit, method="highs")
    if done.status != 0:
        raise RuntimeError(f"the dispatch programme ended with status {done.status}: {done.message}")
    load_G = fixed_G.copy()
    np.add.at(load_G, gpu_N, done.x[:N] * unit)
    return np.asarray(load_G)
