"""Seconds of decode steps and prefill chunks as a linear function of where experts live.

One use of an expert by a batch that brings it n > 0 rows costs
  GPU    the longer of reading its weights from HBM and n rows of arithmetic, or what a measured curve says,
  CPU    the longer of reading its weights at the processors' rate and n rows of arithmetic,
  DRAM, PCIe, SSD    its weights over the rate,
  peers  its weights over NVLink, or over PCIe;
  links  n rows of dispatch and combine bytes.
Costs are means over batches of the trace: which experts a batch touches together is counted, not assumed. Loads alone
know nothing of batches; tokens then count as independent: an expert of share p is touched by 1 - (1 - K p)^tokens.
Layer seconds are the largest mean work chain plus the largest mean traffic chain. The mean of the largest is not less:
`replay` tells it batch by batch.

Floor. Any plan, with copies or without, costs at least the linear relaxation in which experts are divided between ways
at will: a copy that gets a part of an expert's rows costs at least that part of the whole (seconds per row never rise
with rows) and needs all of its memory. `relaxation` gives the dual of that relaxation.

Shapes: W scenarios, L layers, E experts, A batches, C kinds of cost, Y ways, H chains, U memory pools.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.problem import Problem, Scenario
from ..contract.spec import DTYPE_BYTES
from ..data.batches import count_rows_AE, decode_batches, spread, traffic_batches
from .ways import TRAFFIC, WORK, Ways, ways_of

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
ROUNDING_SLACK = 1 + 1e-12  # of a capacity in experts, for quotients that are rounded
SCALE_BLOCK = 128  # fp8 values that share one float32 scale, as in DeepEP
MOST_BATCHES = 2000  # of a trace, evenly spaced: their mean differed from all of GPT-OSS's by less than 1 %


@dataclass(frozen=True, kw_only=True, eq=False)
class TierModel:
    """Costs of all experts on all ways.

    Args:
        ways: homes and how experts are served from them.
        weight_W: how often each scenario counts; a scenario is one kind of step of one workload.
        names_W: kind of step, its tokens and its data, such as `decode 16, trace`.
        cost_WLEC: mean seconds of one step per expert and kind of cost.
        bytes_L: of one expert of each layer.
        experts_L: experts of each layer; those beyond are padding without cost and bytes.
        members_LE: where experts stand for groups, how many each; None elsewhere.
    """

    ways: Ways
    weight_W: Float
    names_W: tuple[str, ...]
    cost_WLEC: Float
    bytes_L: Float
    experts_L: Integer
    members_LE: Float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, E, Y."""
        return self.cost_WLEC.shape[1], self.cost_WLEC.shape[2], len(self.ways.ways)

    def chain_costs_WEYH(self, layer: int) -> Float:
        """What each expert on each way adds to each chain of a layer."""
        Y, H, C = self.ways.use_YHC.shape
        cost_WEC = self.cost_WLEC[:, layer]
        return np.asarray((cost_WEC @ self.ways.use_YHC.reshape(Y * H, C).T).reshape(*cost_WEC.shape[:2], Y, H))

    def layer_seconds(self, load_WH: Float) -> Float:
        """Weighted seconds of a layer from the loads of its chains; leading axes are kept."""
        group_H = self.ways.group_H
        parts = [load_WH[..., group_H == group].max(axis=-1, initial=0.0) for group in (WORK, TRAFFIC)]
        return np.asarray((sum(parts) * self.weight_W).sum(axis=-1))

    def load_LWH(self, way_LE: Integer) -> Float:
        """Loads of all chains when every expert has one home."""
        loads = np.zeros((len(way_LE), len(self.weight_W), len(self.ways.group_H)))
        for layer, way_E in enumerate(way_LE):
            real = int(self.experts_L[layer])
            loads[layer] = np.einsum("wec,ehc->wh", self.cost_WLEC[:, layer, :real], self.ways.use_YHC[way_E[:real]])
        return loads

    def seconds(self, way_LE: Integer) -> float:
        """Weighted seconds of all layers: the objective."""
        return float(self.layer_seconds(self.load_LWH(way_LE)).sum())

    def used_U(self, way_LE: Integer) -> Float:
        """Bytes in each memory pool."""
        used_U = np.zeros(len(self.ways.capacity_U))
        for layer, way_E in enumerate(way_LE):
            np.add.at(used_U, self.ways.pool_Y[way_E[: self.experts_L[layer]]], self.bytes_L[layer])
        return used_U


def tier_model(problem: Problem, expert_bytes: float | Float | None = None) -> TierModel:
    """The model of a problem: a decode step of each scenario, and a prefill chunk where `tiers.chunk` is given.

    Args:
        problem: its cluster has `tiers`, rates and sizes; several scenarios count equally.
        expert_bytes: bytes of one expert: one size or [L]; None takes the cluster file's.

    Raises:
        ValueError: if no size is known, or the experts do not fit in all memories together.
    """
    cluster, tiers = problem.cluster, problem.cluster.tiers
    bytes_L = _bytes_L(problem, expert_bytes)
    ways = _without_spare(ways_of(cluster), cluster.ep.spare_slots, bytes_L)
    steps = [("decode", tiers.batch, 1.0)]
    if tiers.chunk is not None:
        steps.append(("chunk", tiers.chunk, tiers.chunk_weight))
    cost, weight, names = [], [], []
    for scenario in problem.scenarios:
        for kind, tokens, times in steps:
            cost.append(_costs_LEC(problem, scenario, ways, kind, tokens, bytes_L))
            weight.append(times / len(problem.scenarios))
            names.append(f"{kind} {tokens}, {scenario.name}")
    model = TierModel(
        ways=_whole_slots(ways, bytes_L),
        weight_W=np.array(weight),
        names_W=tuple(names),
        cost_WLEC=np.stack(cost),
        bytes_L=bytes_L,
        experts_L=problem.experts_L,
    )
    expect_room(model)
    return model


def _without_spare(ways: Ways, spare_slots: int, bytes_L: Float) -> Ways:
    """Capacities of GPUs without the slots of each layer that stay free."""
    is_gpu_U = np.array([name.startswith("GPU") for name in ways.pool_names])
    left_U = np.maximum(ways.capacity_U - is_gpu_U * spare_slots * float(bytes_L.sum()), 0)
    return replace(ways, capacity_U=left_U)


def _whole_slots(ways: Ways, bytes_L: Float) -> Ways:
    """Capacities cut to whole experts where all are of one size, since no plan can use the rest."""
    if np.ptp(bytes_L) > 0:
        return ways
    slots_U = np.floor(ways.capacity_U / bytes_L[0] * ROUNDING_SLACK)
    return replace(ways, capacity_U=slots_U * bytes_L[0])


def expect_room(model: TierModel) -> None:
    """Raise ValueError if all memories together are too small, with what is short."""
    needed = float((model.bytes_L * model.experts_L).sum())
    have = model.ways.capacity_U
    if not len(have) or needed > have.sum() * ROUNDING_SLACK:
        raise ValueError(_shortage(model, needed))


def _shortage(model: TierModel, needed: float) -> str:
    from routing.ground.quantity import format_size

    ways = model.ways
    totals = [
        (name, sum(float(c) for c, pool in zip(ways.capacity_U, ways.pool_names, strict=True) if pool.startswith(head)))
        for name, head in (("GPUs", "GPU"), ("host memories", "host"), ("SSDs", "SSD"))
    ]
    held = ", ".join(f"{name} {format_size(size)}" for name, size in totals)
    short = max(needed - float(ways.capacity_U.sum()), float(model.bytes_L.max()))
    return (
        f"the experts need {format_size(needed)}, the memories hold {format_size(float(ways.capacity_U.sum()))} "
        f"({held}): {format_size(short)} are missing; add nodes, a larger dram, or an ssd of {format_size(short)} "
        "to node_types"
    )


def _bytes_L(problem: Problem, expert_bytes: float | Float | None) -> Float:
    size = problem.cluster.model.bytes_per_expert if expert_bytes is None else expert_bytes
    if size is None:
        raise ValueError(
            "tiers need the size of an expert: model.expert_bytes in the cluster file, or model.hidden and "
            "moe_intermediate"
        )
    bytes_L = np.broadcast_to(np.asarray(size, np.float64), (problem.num_layers,)).copy()
    if not np.all(bytes_L > 0):
        raise ValueError(f"expert_bytes must be positive; got {bytes_L.min()}")
    return bytes_L


def _costs_LEC(problem: Problem, scenario: Scenario, ways: Ways, kind: str, tokens: int, bytes_L: Float) -> Float:
    """Mean seconds per use and kind of cost; from the batches of a trace, else from shares."""
    L, E = scenario.load_LE.shape
    cost_LEC = np.zeros((L, E, len(ways.kinds)))
    batch_AT = None
    if scenario.trace is not None and tokens > 1:
        form = decode_batches if kind == "decode" else traffic_batches
        batch_AT = spread(form(scenario.trace, tokens), MOST_BATCHES)
    per_token_LE = _per_token_LE(problem, scenario)
    for layer in range(L):
        if batch_AT is not None and scenario.trace is not None:
            rows_NE, odds_NE = count_rows_AE(scenario.trace, batch_AT, layer).astype(np.float64), None
        else:
            per_token_E = np.minimum(per_token_LE[layer], 1.0)
            odds_NE = (-np.expm1(tokens * np.log1p(-np.minimum(per_token_E, 1 - 1e-15))))[None]
            rows_NE = np.divide(tokens * per_token_E, odds_NE, out=np.zeros_like(odds_NE), where=odds_NE > 0)
        for number, (name, index) in enumerate(ways.kinds):
            cost_NE = seconds_of(problem.cluster, name, index, rows_NE, float(bytes_L[layer]))
            cost_LEC[layer, :, number] = (cost_NE if odds_NE is None else cost_NE * odds_NE).mean(axis=0)
    return cost_LEC


def _per_token_LE(problem: Problem, scenario: Scenario) -> Float:
    """How often a token uses each expert."""
    if scenario.trace is not None:
        return scenario.load_LE / scenario.trace.num_tokens
    return np.asarray(
        problem.top_k * scenario.load_LE / np.maximum(scenario.load_LE.sum(axis=1, keepdims=True), 1e-300)
    )


def seconds_of(cluster: Cluster, name: str, index: int, rows: Float, expert_bytes: float) -> Float:
    """Seconds that so many rows of one expert keep a device busy; 0 for no rows.

    Args:
        cluster: its rates.
        name, index: kind of cost, and the GPU or node.
        rows: of any shape.
        expert_bytes: of one expert.
    """
    used = rows > 0
    if name in ("nvlink", "nic"):
        rates = cluster.nvlink_bytes_per_s_G if name == "nvlink" else cluster.nic_bytes_per_s_G
        return np.asarray(rows * _message_bytes(cluster) / rates[index])
    if name == "peer":
        return np.asarray(used * (expert_bytes / cluster.nvlink_bytes_per_s_G[index]))
    if name in ("dram", "pcie", "ssd"):
        return np.asarray(used * (expert_bytes / getattr(cluster, f"{name}_bytes_per_s_M")[index]))
    flops = 2 * expert_bytes / DTYPE_BYTES[cluster.model.dtype] * rows
    if name == "cpu":
        read_s = expert_bytes / cluster.cpu_bytes_per_s_M[index]
        return np.asarray(np.where(used, np.maximum(read_s, flops / cluster.cpu_flops_M[index]), 0.0))
    if cluster.curves and cluster.curves[index]:
        return _on_curve(cluster.curves[index], rows)
    read_s = expert_bytes / cluster.hbm_bytes_per_s_G[index]
    compute_s = flops / (cluster.flops_G[index] * cluster.speed_G[index])
    return np.asarray(np.where(used, np.maximum(read_s, compute_s), 0.0))


def _on_curve(curve: Sequence[tuple[int, float]], rows: Float) -> Float:
    """Measured seconds, linear between the points; beyond the last one in proportion to the rows."""
    at, seconds = (np.array(column, np.float64) for column in zip(*curve, strict=True))
    beyond = rows * seconds[-1] / at[-1]
    return np.asarray(np.where(rows > 0, np.where(rows > at[-1], beyond, np.interp(rows, at, seconds)), 0.0))


def _message_bytes(cluster: Cluster) -> float:
    """Dispatch and combine bytes of one row; 0 where the model's width is not known."""
    model = cluster.model
    hidden = model.hidden or 0
    return (model.dispatch_bytes or hidden * (1 + 4 / SCALE_BLOCK)) + (model.combine_bytes or 2.0 * hidden)
