"""Routers that decide ahead: their exact plans for the runtime to read by, and for forming batches.

A router decides ahead if it has a method `exact_plan`: from what its forward returned and was given, later layers'
experts. One that needs token ids only has a method `plan_of_ids` besides.

Shapes: N prompts, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .prefetch import Prefetcher
from .reschedule import Signature


class ExactPlan(Prefetcher):
    """Reads what the model's own routers have decided for later layers of a pass; nothing is guessed."""

    def __init__(self) -> None:
        self.is_active = True

    def attach(self, model: nn.Module, runtime: Any) -> None:
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

        def follow(router: Any, inputs: Any, result: Any) -> None:
            plan = router.exact_plan(result, *inputs)
            runtime.read_ahead({layer: _most_used_first(expert_TK) for layer, expert_TK in plan.items()})

        for router in routers:
            router.register_forward_hook(follow)

    def look_ahead(self, layer: int, x_1D: Any, expert_1K: Any, layers: Sequence[Any]) -> None:
        """Nothing is left to guess."""

    def judge(self, issued: int, useful: int, late: int) -> None:
        """A plan is exact, so it always pays."""


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


def _most_used_first(expert_TK: torch.Tensor) -> list[int]:
    expert_ids, counts = expert_TK.unique(return_counts=True)
    ordered: list[int] = expert_ids[counts.argsort(descending=True, stable=True)].tolist()
    return ordered
