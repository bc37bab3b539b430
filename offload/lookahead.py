"""Routers that decide ahead: their exact plans for the runtime to read by, and for forming batches.

A router decides ahead if it has a method `exact_plan`: from what its forward returned, later layers' experts. One that
needs token ids only has a method `plan_of_ids` besides.

Shapes: N prompts, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .reschedule import Signature
from .runtime import OffloadRuntime


def follow_plans(model: nn.Module, runtime: OffloadRuntime) -> None:
    """Tell the runtime every plan as soon as a router has made it.

    Raises:
        ValueError: if no router of the model decides ahead.
    """
    routers = [module for module in model.modules() if hasattr(module, "exact_plan")]
    if not routers:
        raise ValueError(
            f'prefetch="plan" needs routers that decide ahead (pregate, or the architecture readme); '
            f"{type(model).__name__} has none"
        )

    def follow(router: Any, _inputs: Any, result: Any) -> None:
        runtime.follow(router.exact_plan(result))

    for router in routers:
        router.register_forward_hook(follow)


@torch.no_grad()
def planned_signature(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Signature:
    """Which experts each prompt will use in any layer, before the model has run: input of `form_batches`, [N, L * E].

    Raises:
        ValueError: if the model's experts do not follow from token ids alone.
    """
    router: Any = next((module for module in model.modules() if hasattr(module, "plan_of_ids")), None)
    if router is None:
        raise ValueError(
            f"{type(model).__name__} has no router over token ids; record a trace and use `signatures` instead"
        )
    rows = []
    for prompt in prompts:
        uses_LE = np.zeros((router.num_routed_layers, router.num_experts), bool)
        uses_LE[:, router.plan_of_ids(torch.tensor([list(prompt)])).unique().numpy()] = True
        rows.append(uses_LE.reshape(-1))
    return np.stack(rows)
