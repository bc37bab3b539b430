"""Glider: layer-normed local gates, to which a request may add one bias per expert.

Experts are tuned apart, then each one's gate on the frozen expert, and only the routing joins them.

Source: Li et al. 2024, arXiv:2410.07172, section 3; the bias is `routing.task_bias`, a call's `logit_bias_LR`.
"""

from routing import GliderRouter

from ...experts.low_rank import LowRankExperts
from ...layers.layer import build_moe_layer
from ...parts.config import MoEConfig
from ..body import Body
from .rescored import rescored_routers


def glider(config: MoEConfig, *, rank: int = 0) -> Body:
    """Mixture-of-experts layers with Glider's gates; as published, top-2 of a softmax, renormalised.

    Args:
        rank: of low-rank experts beside the shared feed-forward network, as published; 0 for whole experts.

    Raises:
        ValueError: if low-rank experts have no shared network to stand beside.
    """
    if rank and not config.num_shared_experts:
        raise ValueError("low-rank experts stand beside a feed-forward network: num_shared_experts must be at least 1")
    return Body(
        layers=[
            build_moe_layer(config, router, LowRankExperts(config, rank) if rank else None)
            for router in rescored_routers(config, GliderRouter)
        ]
    )
