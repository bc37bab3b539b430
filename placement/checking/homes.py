"""What the checker of tiers knows of homes: which ones an expert has, which ones a cluster offers, and their room."""

import math
from collections import defaultdict

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from .costs import Home, computing_gpus, expert_sizes

POOLS = {"gpu": "GPU", "host": "host memory of node", "ssd": "SSD of node"}


def homes_of_layer(plan: Plan, layer: int) -> dict[int, list[Home]]:
    """Every home of every expert of a layer."""
    assert plan.homes is not None
    found: dict[int, list[Home]] = defaultdict(list)
    per_gpu = plan.slots_per_gpu
    for slot, expert in enumerate(plan.physical_to_logical_LP[layer].tolist()):
        if expert >= 0:
            found[expert].append(("gpu", slot // per_gpu, False))
    for place, table in (("host", plan.homes.host_LEM), ("ssd", plan.homes.ssd_LEM)):
        for expert, row in enumerate(table[layer].tolist()):
            found[expert] += [(place, node, code == 2) for node, code in enumerate(row) if code]
    return {expert: homes for expert, homes in found.items() if homes}


def is_possible(cluster: Cluster, home: Home) -> bool:
    """Whether the cluster can serve an expert from that home in that way."""
    place, index, streamed = home
    if place == "gpu":
        links = cluster.pcie_bytes_per_s_M if cluster.tiers.peers == "pcie" else cluster.dram_bytes_M + 1
        return index in computing_gpus(cluster) or bool(links[cluster.node_G[index]] > 0)
    allowed = cluster.tiers.cpu
    if cluster.tiers.gpu == "required":
        return False
    if streamed:
        return (allowed is None or allowed.stream) and cluster.pcie_bytes_per_s_M[index] > 0
    return (allowed is None or allowed.compute) and cluster.cpu_bytes_per_s_M[index] > 0


def possible_homes(plan: Plan) -> list[Home]:
    """All homes that have room at all."""
    cluster = plan.cluster
    homes: list[Home] = [("gpu", g, False) for g in range(cluster.num_gpus) if cluster.memory_bytes_G[g] > 0]
    homes += [(place, m, s) for place in ("host", "ssd") for m in range(cluster.num_nodes) for s in (False, True)]
    return [home for home in homes if room(plan, home[0], home[1]) > 0 and is_possible(cluster, home)]


def room(plan: Plan, place: str, index: int) -> float:
    """Bytes for experts; of a GPU without the slots that stay free in each layer."""
    cluster = plan.cluster
    rooms = {"gpu": cluster.memory_bytes_G, "host": cluster.dram_bytes_M, "ssd": cluster.ssd_bytes_M}
    spare = cluster.ep.spare_slots * sum(expert_sizes(plan) or []) if place == "gpu" else 0.0
    return max(float(rooms[place][index]) - spare, 0.0)


def usable_room(plan: Plan, place: str, index: int) -> float:
    """The same; whole experts where all are of one size, since no plan can use the rest."""
    sizes, have = expert_sizes(plan) or [], room(plan, place, index)
    return have if len(set(sizes)) != 1 else math.floor(have / sizes[0] * (1 + 1e-12)) * sizes[0]


def pool_name(home: Home) -> str:
    """As the multipliers of a certificate name the memory of a home."""
    return f"{POOLS[home[0]]} {home[1]}"
