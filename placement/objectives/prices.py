"""What one unit of imbalance and of node fan-out costs in units of GPU fan-out."""

from ..contract.cluster import Cluster

# Higher keeps more balancedness on unseen sequences and gives up fan-out. 1.6 and 2.3 were tried on one node: at 1.6
# the planned half itself just kept 0.90. experiments/records/2026-11-21_placement-goals, "What it reaches" in the docs.
PRICE_ONE_NODE = 1.8
PRICE_SEVERAL_NODES = 1.0  # node fan-out is worth more there; experiments/records/2026-11-21_placement-solvers
HOP_IMBALANCE_PRICE = 0.23  # 0.26 left balance to spare: experiments/records/2026-11-21_placement-solvers


def fanout_weights(cluster: Cluster) -> tuple[float, float]:
    """Weights of GPU and node fan-out in `fanout`: GPUs alone on one node, else nodes plus GPUs at NVLink's price."""
    return (1.0, 0.0) if cluster.num_nodes == 1 else (1 / cluster.node_link_ratio, 1.0)


def imbalance_price(cluster: Cluster) -> float:
    """What `fanout+balance` pays, in GPUs (or nodes) per token, for a fullest GPU twice as full as the mean one."""
    return PRICE_ONE_NODE if cluster.num_nodes == 1 else PRICE_SEVERAL_NODES
