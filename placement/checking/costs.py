"""What the checker of tiers knows of costs: seconds of each expert on each device, derived from the cluster's numbers.

Shares no code with the model on purpose; only how batches are formed from a trace. Shapes: A batches, E experts.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..data.batches import decode_batches, spread, traffic_batches

Float = NDArray[np.float64]
BATCHES = 2000  # as many as the model counts; another number would be other seconds
Home = tuple[str, int, bool]  # "gpu", "host" or "ssd"; which; whether copied to GPUs for each use


def expert_sizes(plan: Plan) -> list[float] | None:
    named = plan.metadata.get("expert_bytes", plan.cluster.model.bytes_per_expert)
    if named is None:
        return None
    return [float(size) for size in named] if isinstance(named, list) else [float(named)] * plan.num_layers


class DeviceCosts:
    """Mean seconds of each expert of a scenario on each device, computed once for alike devices."""

    def __init__(self, plan: Plan, problem: Problem, scenario: Scenario, kind: str, tokens: int) -> None:
        self.plan, self.sizes = plan, expert_sizes(plan) or []
        self.batches = None
        if scenario.trace is not None and tokens > 1:
            form = decode_batches if kind == "decode" else traffic_batches
            self.batches = spread(form(scenario.trace, tokens), BATCHES)
        self.scenario, self.tokens, self.top_k = scenario, tokens, problem.top_k
        self.known: dict[tuple[Any, ...], Float] = {}
        self.rows: dict[int, tuple[Float, Float]] = {}

    def of(self, layer: int, device: str, index: int) -> Float:
        """[E] seconds of a step that each expert keeps the device busy."""
        key = (layer, device, self._alike(device, index))
        if key not in self.known:
            rows_AE, weight_AE = self._rows(layer)
            busy_AE = np.where(rows_AE > 0, self._seconds(layer, device, index, rows_AE), 0.0)
            self.known[key] = (busy_AE * weight_AE).sum(axis=0) / len(rows_AE)
        return self.known[key]

    def _rows(self, layer: int) -> tuple[Float, Float]:
        """Rows of each expert in each batch, and how likely that is."""
        if layer not in self.rows:
            load_E = self.scenario.load_LE[layer]
            if self.batches is not None and self.scenario.trace is not None:
                chosen = self.scenario.trace.expert_TLK[:, layer]
                count = [
                    np.bincount(c[c >= 0], minlength=len(load_E)) for c in (chosen[b].ravel() for b in self.batches)
                ]
                self.rows = {layer: (np.array(count, np.float64), np.ones((len(count), len(load_E))))}
            else:
                trace = self.scenario.trace
                each = load_E * self.top_k / max(load_E.sum(), 1e-300) if trace is None else load_E / trace.num_tokens
                each = np.minimum(each, 1.0)
                odds = 1 - (1 - each) ** self.tokens
                self.rows = {
                    layer: (np.where(odds > 0, self.tokens * each / np.maximum(odds, 1e-300), 0)[None], odds[None])
                }
        return self.rows[layer]

    def _alike(self, device: str, index: int) -> Any:
        c = self.plan.cluster
        if device == "gpu":
            curve = c.curves[index] if c.curves else ()
            return float(c.hbm_bytes_per_s_G[index]), float(c.flops_G[index] * c.speed_G[index]), curve
        if device == "cpu":
            return float(c.cpu_bytes_per_s_M[index]), float(c.cpu_flops_M[index])
        ending, link = "G" if device in ("nvlink", "nic", "peer") else "M", device.replace("peer", "nvlink")
        return float(getattr(c, f"{link}_bytes_per_s_{ending}")[index])

    def _seconds(self, layer: int, device: str, index: int, rows_AE: Float) -> Float:
        c, size, rate = self.plan.cluster, self.sizes[layer], self._alike(device, index)
        if device in ("dram", "pcie", "ssd", "peer"):
            return np.full(rows_AE.shape, size / rate)
        if device in ("nvlink", "nic"):
            hidden = c.model.hidden or 0
            sent = c.model.dispatch_bytes or hidden + hidden / 32
            return rows_AE * (sent + (c.model.combine_bytes or 2 * hidden)) / rate
        bits = {"fp4": 4, "fp8": 8, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}[c.model.dtype]
        if device == "gpu" and rate[2]:
            at, seconds = zip(*rate[2], strict=True)
            tail = rows_AE / at[-1] * seconds[-1]
            return np.where(rows_AE > at[-1], tail, np.interp(rows_AE, at, seconds))
        return np.maximum(size / rate[0], rows_AE * (size * 8 / bits) * 2 / rate[1])


def steps_of(plan: Plan, problem: Problem) -> Iterator[tuple[str, float, DeviceCosts]]:
    tiers, count = plan.cluster.tiers, len(problem.scenarios)
    for scenario in problem.scenarios:
        yield (
            f"decode {tiers.batch}, {scenario.name}",
            1 / count,
            DeviceCosts(plan, problem, scenario, "decode", tiers.batch),
        )
        if tiers.chunk is not None:
            costs = DeviceCosts(plan, problem, scenario, "chunk", tiers.chunk)
            yield f"chunk {tiers.chunk}, {scenario.name}", tiers.chunk_weight / count, costs


def busy_devices(cluster: Cluster, home: Home) -> Iterator[tuple[str, str, int, float]]:
    """Chain, device, index and share of everything that one use of a home keeps busy; work first, then traffic."""
    place, index, streamed = home
    node = int(cluster.node_G[index]) if place == "gpu" else index
    everyone = computing_gpus(cluster)
    inside = [g for g in everyone if cluster.node_G[g] == node]
    lends = place == "gpu" and index not in inside
    used: list[tuple[str, int, float]] = []
    if lends:
        used = [("pcie", node, 1.0) if cluster.tiers.peers == "pcie" else ("peer", inside[0], 1.0)]
        used.append(("gpu", inside[0], 1.0))
    elif place == "gpu":
        used = [("gpu", index, 1.0)]
    else:
        if place == "ssd":
            used.append(("ssd", node, 1.0))
        if streamed:
            used += [("pcie", node, 1 / len(inside)), *(("gpu", g, 1 / len(inside)) for g in inside)]
        else:
            used.append(("cpu", node, 1.0))
        if cluster.dram_bytes_per_s_M[node] > 0 and cluster.tiers.overlap:
            used.append(("dram", node, 1.0))
    for device, number, share in used:
        if cluster.tiers.overlap:
            yield f"{device} {number}", device, number, share
        else:
            for g in [number] if device == "gpu" else inside:
                yield f"serial {g}", device, number, share
    if place == "gpu" and len(inside) > 1:
        yield f"nvlink {index}", "nvlink", index, (len(inside) - 1) / len(everyone)
    if len(inside) < len(everyone):
        reached = [index] if place == "gpu" and not lends else inside
        for g in reached:
            yield f"nic {g}", "nic", g, (1 - len(inside) / len(everyone)) / len(reached)


def computing_gpus(cluster: Cluster) -> list[int]:
    """All GPUs; the first of each node where the others are peers that lend memory."""
    nodes = cluster.node_G.tolist()
    return [g for g, node in enumerate(nodes) if cluster.tiers.peers is None or g == nodes.index(node)]
