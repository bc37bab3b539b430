"""Routers that decide ahead: their exact plans for the runtime to read by, and for forming batches.

A router decides ahead if it has a method `exact_plan`: from what its forward returned and was given, later layers'
experts. One that needs token ids only also has a method `plan_of_ids`. A router that limits its next tokens to some
experts has a method `held_experts`, which names them by layer.

Shapes: N prompts, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .prefetch import Prefetcher


def holds_experts(model: nn.Module) -> bool:
    """Whether routers of the model limit their next tokens to experts that they name."""
    return any(hasattr(module, "held_experts") for module in model.modules())


class ExactPlan(Prefetcher):
    """Reads what the model's own routers have decided for later layers of a pass; nothing is guessed."""

    def __init__(self) -> None:
        self.is_active = True

    def attach(self, model: nn.Module, ahead: Any) -> None:
        """Pass every plan on, and every set of experts to keep, as soon as a router has made it.

        Raises:
            ValueError: if no router of the model decides ahead.
        """
        planning = [module for module in model.modules() if hasattr(module, "exact_plan")]
        holding = [module for module in model.modules() if hasattr(module, "held_experts")]
        if not planning and not holding:
            raise ValueError(
                f'prefetch="plan" needs routers that decide ahead (pregate, resident, or the architecture readme); '
                f"{type(model).__name__} has none"
            )

        def follow(router: Any, inputs: Any, result: Any) -> None:
            plan = router.exact_plan(result, *inputs)
            ahead.read({layer: most_used_first(expert_TK) for layer, expert_TK in plan.items()})

        def keep(router: Any, inputs: Any, result: Any) -> None:
            ahead.hold({layer: held.tolist() for layer, held in router.held_experts(result).items()})

        for router in planning:
            router.register_forward_hook(follow)
        for router in holding:
            router.register_forward_hook(keep)

    def look_ahead(self, layer: int, x_1D: Any, expert_1K: Any, layers: Sequence[Any]) -> None:
        """Nothing is left to guess."""

    def judge(self, issued: int, useful: int, late: int) -> None:
        """A plan is exact, so it always pays."""


def most_used_first(expert_TK: torch.Tensor) -> list[int]:
    """Experts by how many tokens visit them, those of most tokens first."""
    expert_ids, counts = torch.unique(expert_TK, return_counts=True)
    ordered: list[int] = expert_ids[counts.argsort(descending=True, stable=True)].tolist()
    return ordered
