"""Latency model of one MoE layer: dispatch all-to-all, experts on the slowest GPU, combine all-to-all.

seconds = dispatch + max over GPUs of experts + combine.
A batch has `ep.tokens_per_gpu` tokens per GPU, sources spread evenly, experts drawn as in the data.
All-to-all: the fullest GPU's ingress or egress, at NIC and at NVLink speed, plus the latencies. `dedup` says how many
copies of a token cross: `node` one per destination node over the NIC and then one per GPU over NVLink, `gpu` one per
GPU, `none` (and `ep.mode: ll`) one per expert. With `links.rank_cost_matrix` a GPU's ingress costs what the mean of its
column says.
Experts: 3 matrices of hidden x intermediate; tokens are padded to tiles of 128 per expert in `ht` mode; never faster
than reading the activated experts from HBM. Sizes come from the cluster file's `model`.
Source: constants and shape of the model after DeepEP and METRO (arXiv:2512.09277); see docs/placement.md.
Shapes: L layers, E experts, G GPUs, M nodes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from .activated import activation_weight_LE
from .dispatch import share_EG
from .fanout import gpu_fanout_L, node_fanout_L

Float = NDArray[np.float64]
TILE_ROWS = 128  # rows of a tile of grouped products, as in the sources above
KERNEL_LATENCY_S = 3e-6  # of launching one kernel, as in the sources above
SCALE_BLOCK = 128  # fp8 values that share one float32 scale, as in DeepEP


def layer_seconds_L(plan: Plan, load_LE: Float, trace: RoutingTrace | None) -> Float:
    """Modelled seconds of each MoE layer for one batch.

    Raises:
        ValueError: if the cluster file lacks `model.hidden`, `model.moe_intermediate` or (without a trace) `top_k`.
    """
    sizes = model_sizes(plan.cluster, trace)
    return expert_seconds_LG(plan, load_LE, sizes).max(axis=1) + traffic_seconds_L(plan, load_LE, trace, sizes)


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Modelled seconds of one batch, mean over MoE layers.

    Args:
        experts_s: arithmetic and weight reads of the slowest GPU.
        traffic_s: dispatch and combine.
        tokens_per_s: of one GPU if MoE layers were all that a step consists of.
    """

    experts_s: float
    traffic_s: float
    tokens_per_s: float


def layer_times(plan: Plan, load_LE: Float, trace: RoutingTrace | None) -> LayerTimes:
    """The parts of `layer_seconds_L`.

    Args:
        plan: where experts are.
        load_LE: routed tokens.
        trace: the tokens, or None: then every token goes to as many GPUs as it has experts.

    Raises:
        ValueError: as `layer_seconds_L`.
    """
    sizes = model_sizes(plan.cluster, trace)
    experts_L = expert_seconds_LG(plan, load_LE, sizes).max(axis=1)
    traffic_L = traffic_seconds_L(plan, load_LE, trace, sizes)
    return LayerTimes(
        experts_s=float(experts_L.mean()),
        traffic_s=float(traffic_L.mean()),
        tokens_per_s=plan.cluster.ep.tokens_per_gpu / float((experts_L + traffic_L).sum()),
    )


def model_sizes(cluster: Cluster, trace: RoutingTrace | None) -> dict[str, float]:
    """Bytes and operations per token, expert and batch."""
    model = cluster.model
    top_k = trace.top_k if trace is not None else model.top_k
    if model.hidden is None or model.moe_intermediate is None or top_k is None:
        raise ValueError(
            "objective latency needs model.hidden, model.moe_intermediate and model.top_k in the cluster file"
        )
    weights = 3.0 * model.hidden * model.moe_intermediate
    return {
        "flops_per_row": 2 * weights,
        "expert_bytes": model.bytes_per_expert or weights,
        "dispatch_bytes": model.dispatch_bytes or model.hidden + 4 * model.hidden / SCALE_BLOCK,
        "combine_bytes": model.combine_bytes or 2.0 * model.hidden,
        "top_k": float(top_k),
        "tokens": float(cluster.ep.tokens_per_gpu * cluster.num_gpus),
    }


def expert_seconds_LG(plan: Plan, load_LE: Float, sizes: dict[str, float]) -> Float:
    """Seconds of each GPU's experts: arithmetic on padded rows or reading the activated experts, the longer one."""
    cluster = plan.cluster
    routes = sizes["tokens"] * sizes["top_k"]
    total_L1 = load_LE.sum(axis=1, keepdims=True)
    rows_LE = np.divide(load_LE, total_L1, out=np.zeros_like(load_LE), where=total_L1 > 0) * routes
    touched_LE = activation_weight_LE(load_LE, plan.replicas_LE, int(routes))
    compute_LG, read_LG = np.zeros((2, plan.num_layers, cluster.num_gpus))
    for layer in range(plan.num_layers):
        copies_EG = plan.copies_LEG[layer]
        rows_EG = rows_LE[layer][:, None] * share_EG(copies_EG, cluster, plan.dispatch, load_LE[layer])
        if cluster.ep.mode == "ht":
            rows_EG = np.ceil(np.round(rows_EG, 6) / TILE_ROWS) * TILE_ROWS
        compute_LG[layer] = rows_EG.sum(axis=0) * sizes["flops_per_row"]
        read_LG[layer] = (touched_LE[layer][:, None] * (copies_EG > 0)).sum(axis=0) * sizes["expert_bytes"]
    rate_G = cluster.flops_G * cluster.speed_G
    return KERNEL_LATENCY_S + np.maximum(compute_LG / rate_G, read_LG / cluster.hbm_bytes_per_s_G)


def traffic_seconds_L(plan: Plan, load_LE: Float, trace: RoutingTrace | None, sizes: dict[str, float]) -> Float:
    """Seconds of dispatch and combine: the busiest GPU's link."""
    cluster = plan.cluster
    if cluster.num_gpus == 1:
        return np.zeros(plan.num_layers)
    nvlink_L, nic_L = seconds_per_byte(plan, trace, sizes)
    skew_L = _ingress_skew_L(plan, load_LE)
    wait = KERNEL_LATENCY_S + (cluster.node_latency_s + cluster.rack_latency_s if cluster.num_nodes > 1 else 0.0)
    return 2 * wait + skew_L * np.maximum(nvlink_L, nic_L) * (sizes["dispatch_bytes"] + sizes["combine_bytes"])


def seconds_per_byte(plan: Plan, trace: RoutingTrace | None, sizes: dict[str, float]) -> tuple[Float, Float]:
    """Seconds of the mean GPU's NVLink, and of its NIC, per byte that a token's copy has."""
    cluster = plan.cluster
    G = cluster.num_gpus
    copies_gpu_L, copies_node_L = _copies_per_token(plan, trace, sizes["top_k"])
    tokens_per_gpu = sizes["tokens"] / G
    inside = float(np.mean(np.bincount(cluster.node_G))) / G
    nvlink_rows_L = copies_gpu_L * (1 - 1 / G if cluster.num_nodes == 1 else 1.0)
    nic_rows_L = copies_node_L * (1 - inside)
    return (
        nvlink_rows_L * tokens_per_gpu / cluster.nvlink_bytes_per_s_G.min(),
        nic_rows_L * tokens_per_gpu / min(float(cluster.nic_bytes_per_s_G.min()), cluster.rack_bytes_per_s),
    )


def _copies_per_token(plan: Plan, trace: RoutingTrace | None, top_k: float) -> tuple[Float, Float]:
    """Copies of a token that cross NVLink and the NIC."""
    ep = plan.cluster.ep
    flat = np.full(plan.num_layers, top_k)
    if ep.mode == "ll" or ep.dedup == "none":
        return flat, flat
    if trace is None:
        gpus, nodes = np.minimum(flat, plan.cluster.num_gpus), np.minimum(flat, plan.cluster.num_nodes)
    else:
        gpus, nodes = gpu_fanout_L(plan, trace), node_fanout_L(plan, trace)
    return gpus, nodes if ep.dedup == "node" else gpus


def _ingress_skew_L(plan: Plan, load_LE: Float) -> Float:
    """Slowest over mean ingress: all-to-all ends when the busiest receiver, its link's cost counted, is done."""
    from .balance import gpu_load_LG

    load_LG = gpu_load_LG(plan, load_LE)
    mean_L = load_LG.mean(axis=1)
    slowest_L = (load_LG * ingress_cost_G(plan.cluster)).max(axis=1)
    return np.divide(slowest_L, mean_L, out=np.ones(len(mean_L)), where=mean_L > 0)


def ingress_cost_G(cluster: Cluster) -> Float:
    """Mean cost of a byte that comes to each GPU by `links.rank_cost_matrix`, 1 on average; 1 without a matrix."""
    if cluster.rank_cost_GG is None or cluster.num_gpus == 1:
        return np.ones(cluster.num_gpus)
    total_G = cluster.rank_cost_GG.sum(axis=0)
    mean = float(total_G.mean())
    return total_G / mean if mean > 0 else np.ones(cluster.num_gpus)
