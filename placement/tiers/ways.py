"""Ways to serve an expert: from which memory, computed where, and what that keeps busy.

A way is a home together with how the expert is used there:
  GPU g               its memory holds the expert, it computes it;
  GPU g, streamed     a peer: its memory holds the expert, which is copied to the node's first GPU for each use;
  host m, computed    the node's processors compute it out of host memory;
  host m, streamed    it is copied to the node's GPUs for each step that uses it, an equal part of them to each;
  SSD m               it is read for each step that uses it, then computed or streamed.
A chain is a sum of times within a layer that nothing can shorten. The work chains of a layer run beside each other, so
do its traffic chains; work and traffic come one after the other: layer seconds = max work chain + max traffic chain.
With overlap each GPU, each node's processors, host memory, PCIe links and SSD is a chain of its own. Without it there
is one work chain per GPU: the GPU, then everything that its node does for lower tiers.

Shapes: Y ways, H chains, U memory pools, C kinds of cost, G GPUs, M nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
Place = Literal["gpu", "host", "ssd"]
WORK, TRAFFIC = 0, 1  # groups of chains


@dataclass(frozen=True, kw_only=True)
class Way:
    """One home and how experts are served from it.

    Args:
        place: kind of memory.
        index: the GPU, or the node.
        streamed: whether it is copied to GPUs for each use; so it is from a peer GPU, which computes nothing.
    """

    place: Place
    index: int
    streamed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Ways:
    """All ways of a cluster.

    Args:
        ways: those whose memory is there.
        pool_Y: the memory pool of each way.
        capacity_U: bytes for experts in each pool.
        pool_names: of each pool, for messages.
        use_YHC: times that one use adds to each chain, per unit of each kind of cost.
        chain_names: of each chain, such as "gpu 3", "ssd 0".
        group_H: WORK or TRAFFIC.
        kinds: of cost, each a name and the GPU or node that it is of.
        class_Y, class_H, class_U: numbers that symmetric ways, chains, pools share.
    """

    ways: tuple[Way, ...]
    pool_Y: Integer
    capacity_U: Float
    pool_names: tuple[str, ...]
    use_YHC: Float
    chain_names: tuple[str, ...]
    group_H: Integer
    kinds: tuple[tuple[str, int], ...]
    class_Y: Integer
    class_H: Integer
    class_U: Integer


def ways_of(cluster: Cluster) -> Ways:
    """The ways of a cluster; ways that no memory or no link allows are left out."""
    found = _gpu_ways(cluster)
    if cluster.tiers.gpu == "optional":
        found += _lower_ways(cluster)
    pools = list(dict.fromkeys((way.place, way.index) for way in found))
    kinds = _Kinds(cluster)
    chains = _chains(cluster)
    entries = [(y, h, c, share) for y, way in enumerate(found) for h, c, share in _uses(cluster, way, chains, kinds)]
    use_YHC = np.zeros((len(found), len(chains), len(kinds.names)))
    for y, h, c, share in entries:
        use_YHC[y, h, c] += share
    gpu_class, node_class = _classes(cluster)
    of_machine = [gpu_class[way.index] if way.place == "gpu" else node_class[way.index] for way in found]
    return Ways(
        ways=tuple(found),
        pool_Y=np.array([pools.index((way.place, way.index)) for way in found], np.int64),
        capacity_U=np.array([_capacity(cluster, *pool) for pool in pools]),
        pool_names=tuple(f"{_POOL[place]} {index}" for place, index in pools),
        use_YHC=use_YHC,
        chain_names=tuple(f"{name} {index}" for name, index in chains),
        group_H=np.array([TRAFFIC if name in ("nvlink", "nic") else WORK for name, _ in chains], np.int64),
        kinds=tuple(kinds.names),
        class_Y=_numbered([(way.place, way.streamed, one) for way, one in zip(found, of_machine, strict=True)]),
        class_H=_numbered([(n, gpu_class[i] if n in _OF_GPU else node_class[i]) for n, i in chains]),
        class_U=_numbered([(p, gpu_class[i] if p == "gpu" else node_class[i]) for p, i in pools]),
    )


_POOL = {"gpu": "GPU", "host": "host memory of node", "ssd": "SSD of node"}
_OF_GPU = ("gpu", "serial", "peer", "nvlink", "nic")


class _Kinds:
    """Numbers kinds of cost in the order in which ways ask for them; alike machines share a kind."""

    def __init__(self, cluster: Cluster) -> None:
        self.names: list[tuple[str, int]] = []
        self._first: dict[tuple[object, ...], int] = {}
        self._cluster = cluster

    def number(self, name: str, index: int) -> int:
        key = (name, *_rates(self._cluster, name, index))
        if key not in self._first:
            self._first[key] = len(self.names)
            self.names.append((name, index))
        return self._first[key]


def _rates(cluster: Cluster, name: str, index: int) -> tuple[object, ...]:
    if name == "gpu":
        curve = cluster.curves[index] if cluster.curves else ()
        return (cluster.hbm_bytes_per_s_G[index], cluster.flops_G[index] * cluster.speed_G[index], curve)
    if name == "cpu":
        return (cluster.cpu_bytes_per_s_M[index], cluster.cpu_flops_M[index])
    rates = {"dram": cluster.dram_bytes_per_s_M, "pcie": cluster.pcie_bytes_per_s_M, "ssd": cluster.ssd_bytes_per_s_M}
    rates |= {"nvlink": cluster.nvlink_bytes_per_s_G, "nic": cluster.nic_bytes_per_s_G}
    rates |= {"peer": cluster.nvlink_bytes_per_s_G}
    return (rates[name][index],)


def _gpu_ways(cluster: Cluster) -> list[Way]:
    """GPUs with memory; a peer without a link to copy over is of no use."""
    is_linked_G = np.full(cluster.num_gpus, True)
    if cluster.tiers.peers == "pcie":
        is_linked_G = cluster.pcie_bytes_per_s_M[cluster.node_G] > 0
    return [
        Way(place="gpu", index=g, streamed=not computes)
        for g, computes in enumerate(cluster.computes_G.tolist())
        if cluster.memory_bytes_G[g] > 0 and (computes or is_linked_G[g])
    ]


def _lower_ways(cluster: Cluster) -> list[Way]:
    stores: tuple[tuple[Place, Float], ...] = (("host", cluster.dram_bytes_M), ("ssd", cluster.ssd_bytes_M))
    cpu = cluster.tiers.cpu
    may_compute, may_stream = (True, True) if cpu is None else (cpu.compute, cpu.stream)
    found = []
    for m in range(cluster.num_nodes):
        computes = may_compute and cluster.cpu_bytes_per_s_M[m] > 0
        streams = may_stream and cluster.pcie_bytes_per_s_M[m] > 0
        for place, size_M in stores:
            if size_M[m] > 0:
                found += [Way(place=place, index=m)] if computes else []
                found += [Way(place=place, index=m, streamed=True)] if streams else []
    return found


def _chains(cluster: Cluster) -> list[tuple[str, int]]:
    gpus, nodes = np.flatnonzero(cluster.computes_G).tolist(), range(cluster.num_nodes)
    if cluster.tiers.overlap:
        chains = [("gpu", g) for g in gpus] + [(n, m) for n in ("cpu", "dram", "pcie", "ssd") for m in nodes]
        chains += [("peer", g) for g in gpus] if cluster.tiers.peers == "nvlink" else []
    else:
        chains = [("serial", g) for g in gpus]
    if len(gpus) > 1:
        chains += [("nvlink", g) for g in gpus]
    return chains + ([("nic", g) for g in gpus] if cluster.num_nodes > 1 else [])


def _uses(cluster: Cluster, way: Way, chains: list[tuple[str, int]], kinds: _Kinds) -> list[tuple[int, int, float]]:
    """Chain, kind of cost and factor of everything that one use of a way keeps busy."""
    node = int(cluster.node_G[way.index]) if way.place == "gpu" else way.index
    members = np.flatnonzero((cluster.node_G == node) & cluster.computes_G).tolist()
    computing = int(cluster.computes_G.sum())
    busy: list[tuple[str, int, str, float]] = []  # chain name, index, kind, share
    if way.place == "gpu" and way.streamed:
        first = members[0]
        busy.append(("pcie", node, "pcie", 1.0) if cluster.tiers.peers == "pcie" else ("peer", first, "peer", 1.0))
        busy.append(("gpu", first, "gpu", 1.0))
    elif way.place == "gpu":
        busy.append(("gpu", way.index, "gpu", 1.0))
    else:
        busy += [("ssd", node, "ssd", 1.0)] if way.place == "ssd" else []
        if cluster.dram_bytes_per_s_M[node] > 0:
            busy.append(("dram", node, "dram", 1.0))
        if way.streamed:
            busy.append(("pcie", node, "pcie", 1 / len(members)))
            busy += [("gpu", g, "gpu", 1 / len(members)) for g in members]
        else:
            busy.append(("cpu", node, "cpu", 1.0))
    found = _in_chains(cluster, busy, members, chains, kinds)
    receivers = [way.index] if way.place == "gpu" and not way.streamed else members
    away = 1 - len(members) / computing
    for name, part in (("nvlink", (len(members) - 1) / computing), ("nic", away)):
        for g in receivers if part else ():
            if (name, g) in chains and not (name == "nvlink" and way.place != "gpu"):
                found.append((chains.index((name, g)), kinds.number(name, g), part / len(receivers)))
    return found


def _in_chains(
    cluster: Cluster,
    busy: list[tuple[str, int, str, float]],
    members: list[int],
    chains: list[tuple[str, int]],
    kinds: _Kinds,
) -> list[tuple[int, int, float]]:
    found = []
    for name, index, kind, share in busy:
        number = kinds.number(kind, index)
        if cluster.tiers.overlap:
            found.append((chains.index((name, index)), number, share))
        elif name == "gpu":
            found.append((chains.index(("serial", index)), number, share))
        elif name != "dram" or not any(other in ("cpu", "pcie") for other, *_ in busy):
            found += [(chains.index(("serial", g)), number, share) for g in members]
    return found


def _capacity(cluster: Cluster, place: Place, index: int) -> float:
    arrays = {"gpu": cluster.memory_bytes_G, "host": cluster.dram_bytes_M, "ssd": cluster.ssd_bytes_M}
    return float(arrays[place][index])


def _classes(cluster: Cluster) -> tuple[list[int], list[int]]:
    """Equal numbers for GPUs, and for nodes, that may be exchanged without any difference."""
    own = [
        (
            *_rates(cluster, "gpu", g),
            cluster.memory_bytes_G[g],
            *_rates(cluster, "nvlink", g),
            *_rates(cluster, "nic", g),
            bool(cluster.computes_G[g]),
        )
        for g in range(cluster.num_gpus)
    ]
    names = ("cpu", "dram", "pcie", "ssd")
    nodes = []
    for m in range(cluster.num_nodes):
        gpus = tuple(sorted(map(str, (own[g] for g in np.flatnonzero(cluster.node_G == m)))))
        rates = tuple(_rates(cluster, name, m) for name in names)
        nodes.append((gpus, rates, cluster.dram_bytes_M[m], cluster.ssd_bytes_M[m]))
    node_class = _numbered(nodes).tolist()
    return _numbered([(one, node_class[cluster.node_G[g]]) for g, one in enumerate(own)]).tolist(), node_class


def _numbered(keys: Sequence[object]) -> Integer:
    first = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([first[key] for key in keys], np.int64)
