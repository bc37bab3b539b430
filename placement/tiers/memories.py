"""What each memory of a plan with homes holds.

Shapes: L layers, E experts.
"""

from typing import Any

import numpy as np

from ..contract.plan import Plan


def memory_rows(plan: Plan) -> list[dict[str, Any]]:
    """Experts, bytes and room of each GPU, peer GPU, host memory and SSD of a plan with homes."""
    assert plan.homes is not None
    size_L = np.array(plan.metadata.get("expert_bytes", np.zeros(plan.num_layers)), np.float64)
    cluster, found = plan.cluster, []
    gpus = [f"GPU {g}" if computes else f"peer GPU {g}" for g, computes in enumerate(cluster.computes_G.tolist())]
    columns = [(name, plan.copies_LEG[:, :, g] > 0, cluster.memory_bytes_G[g]) for g, name in enumerate(gpus)]
    for name, table, room_M in (
        ("host memory", plan.homes.host_LEM, cluster.dram_bytes_M),
        ("SSD", plan.homes.ssd_LEM, cluster.ssd_bytes_M),
    ):
        columns += [(f"{name} of node {m}", table[:, :, m] > 0, room_M[m]) for m in range(cluster.num_nodes)]
    for memory, holds_LE, room in columns:
        number_L = holds_LE.sum(axis=1)
        limit = float(room) if np.isfinite(room) else None
        found.append(
            {"memory": memory, "experts": int(number_L.sum()), "bytes": float(number_L @ size_L), "room": limit}
        )
    return found
