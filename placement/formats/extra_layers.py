"""Rows for layers that a plan does not know: the MoE layers of draft (MTP) modules behind the decoder.

No load is recorded for them, so they get the engine's initial layout: experts in order, then the first ones again.
"""

from dataclasses import replace

import numpy as np

from ..contract.plan import Plan


def with_extra_layers(plan: Plan, extra_layers: int) -> Plan:
    """The plan with further MoE layers, numbered from `hidden_layers` on as engines number draft layers.

    Args:
        plan: as solved, for the decoder alone.
        extra_layers: how many, at least 0; 0 gives the plan itself.

    Raises:
        ValueError: if the number is negative.
    """
    if extra_layers < 0:
        raise ValueError(f"extra layers must be 0 or more; got {extra_layers}")
    if extra_layers == 0:
        return plan
    if plan.homes is not None:
        raise ValueError("a plan with host memory and SSDs has no initial layout for draft layers; use 0 extra layers")
    initial_P = np.arange(plan.num_slots) % plan.num_experts
    metadata = dict(plan.metadata)
    if metadata.get("load") is not None:
        load_LE = np.array(metadata["load"], np.float64)
        # equal loads with the mean of the others, so that a ranking over all layers is not skewed
        even = np.full((extra_layers, plan.num_experts), float(load_LE.mean()) or 1.0)
        metadata["load"] = np.concatenate([load_LE, even]).tolist()
    tier_LE = plan.tier_LE
    if tier_LE is not None:
        tier_LE = np.concatenate([tier_LE, np.ones((extra_layers, plan.num_experts), tier_LE.dtype)])
    last = plan.hidden_layers + extra_layers
    return replace(
        plan,
        physical_to_logical_LP=np.concatenate([plan.physical_to_logical_LP, np.tile(initial_P, (extra_layers, 1))]),
        layer_ids=(*plan.layer_ids, *range(plan.hidden_layers, last)),
        hidden_layers=last,
        tier_LE=tier_LE,
        metadata=metadata,
        certificate=None,
    )
