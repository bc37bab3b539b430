"""The pictures of a report: maps of load and traffic, gaps, the front of balance against fan-out.

Shapes: L layers, E experts, G GPUs, T tokens.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..objectives import weighted
from ..objectives.balance import gpu_load_LG
from ..objectives.batches import batch_imbalance_AL, batch_size, policy_of
from ..scoring.score import score
from ..solving.comparison import Row
from ..solving.solve import solve

Float = NDArray[np.float64]
PARETO_PRICES = (0.05, 0.2, 0.5, 1.5, 5.0)  # of imbalance: from nearly free to all that counts; 12 s each
SAMPLE_TOKENS = 20_000  # a heat map of ranks needs no more; all of a long trace would take minutes


def load_maps(problem: Problem, before: Row, after: Plan) -> Figure:
    """Load of each GPU over the mean, layer by layer, of two plans."""
    load_LE = problem.load_WLE.mean(axis=0)
    maps = []
    for plan in (before.plan, after):
        load_LG = gpu_load_LG(plan, load_LE)
        maps.append(load_LG / np.maximum(load_LG.mean(axis=1, keepdims=True), 1e-30))
    return _pair_of_maps(maps, (before.name, "this plan"), "rank", "MoE layer")


def traffic_maps(trace: RoutingTrace, before: Row, after: Plan) -> Figure:
    """`traffic_GG` of two plans, on a sample of the tokens."""
    sample = trace.rows(0, SAMPLE_TOKENS)
    maps = [traffic_GG(plan, sample) for plan in (before.plan, after)]
    return _pair_of_maps(maps, (before.name, "this plan"), "serving rank", "home rank")


def traffic_GG(plan: Plan, trace: RoutingTrace) -> Float:
    """Copies of tokens from home rank to serving rank, per token and layer; at most one per pair of token and GPU."""
    G = plan.cluster.num_gpus
    traffic = np.zeros((G, G))
    home_T = trace.sequence_T % G
    for layer in range(plan.num_layers):
        share_EG = plan.copies_LEG[layer] / plan.replicas_LE[layer][:, None]
        miss_TG = np.ones((trace.num_tokens, G))
        padded = np.concatenate([share_EG, np.zeros((1, G))])
        for k in range(trace.top_k):
            miss_TG *= 1 - padded[trace.expert_TLK[:, layer, k]]
        np.add.at(traffic, home_T, 1 - miss_TG)
    return traffic / max(trace.num_tokens * plan.num_layers, 1)


def imbalance_over_time(trace: RoutingTrace, rows: list[Row]) -> Figure:
    """Fullest over mean GPU of each batch in the order of the traffic, under each plan's own dispatch."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    axis: Any = figure.subplots()
    for row in rows:
        tokens = batch_size(trace, row.plan.cluster.ep.batch_tokens)
        value_AL = batch_imbalance_AL(row.plan, trace, tokens, policy_of(row.plan.dispatch))
        axis.plot(value_AL.mean(axis=1), label=row.name)
    axis.set(xlabel="batch", ylabel="fullest over mean GPU")
    axis.legend()
    return figure


def _pair_of_maps(maps: list[Float], names: tuple[str, str], across: str, down: str) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    image = None
    for axis, values, name in zip(axes, maps, names, strict=True):
        image = axis.imshow(values, aspect="auto", vmin=low, vmax=high, cmap="magma", interpolation="nearest")
        axis.set(title=name, xlabel=across, ylabel=down)
    if image is not None:
        figure.colorbar(image, ax=axes)
    return figure


def gaps(gaps: list[float]) -> Figure:
    """Histogram of the layers' gaps."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis: Any = figure.subplots()
    axis.hist([100 * gap for gap in gaps], bins=20, color="#5b3a8c")
    axis.set(xlabel="gap (%)", ylabel="layers")
    return figure


def pareto(problem: Problem, rows: list[Row]) -> Figure:
    """Plans of the search at several prices of imbalance, and the rows of the table."""
    several = problem.cluster.num_nodes > 1
    key, part = ("node_fanout", "node-fanout") if several else ("gpu_fanout", "gpu-fanout")
    points = []
    for price in PARETO_PRICES:
        objective = weighted([(1.0, part), (price, "balance")])
        found = score(problem, solve(problem, objective=objective, solver="search", time_limit_s=12), "balance")
        points.append((getattr(found, key), found.balancedness))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis: Any = figure.subplots()
    axis.plot(*zip(*sorted(points), strict=True), "o-", color="#5b3a8c", label="search, knowing this data")
    for row in rows:
        axis.plot(getattr(row.score, key), row.score.balancedness, "s", label=row.name)
    axis.set(xlabel="nodes per token" if several else "GPUs per token", ylabel="balancedness")
    axis.legend()
    return figure
