"""What a reader of a result should know about the cluster that it was made for."""

import numpy as np

from .cluster import Cluster


def cluster_notes(cluster: Cluster) -> list[str]:
    """One sentence for everything in the cluster file that a solver could not use, or was not told."""
    notes = []
    if cluster.model.bytes_per_expert is None:
        notes.append(
            "sizes unknown: memory not checked; give model.expert_bytes, or model.hidden and model.moe_intermediate"
        )
    elif not np.all(np.isfinite(cluster.memory_bytes_G)):
        notes.append("sizes unknown: memory not checked; give gpu_types.NAME.memory")
    rates = (cluster.hbm_bytes_per_s_G, cluster.flops_G)
    if any(np.ptp(rate_G) > 0 for rate_G in rates) and np.ptp(cluster.speed_G) == 0:
        notes.append(
            f"GPU types differ, speed is {cluster.speed_G[0]:g} for all: balance takes them as equal; "
            "give nodes[].speed, for instance the ratio of their hbm (decode) or flops (prefill)"
        )
    return notes
