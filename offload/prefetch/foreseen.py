"""Which experts prompts will use, as far as something says so before the model has run.

Shapes: N prompts, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pass_predictor import PassPrefetcher

Signature = NDArray[np.bool_]
"""[N, L * E]: whether a prompt uses an expert."""


def can_foresee(model: Any) -> bool:
    """Whether `foreseen_experts` has something to say of a model of `load`."""
    is_planned = any(hasattr(module, "plan_of_ids") for module in model.modules())
    return is_planned or isinstance(model.offload.runtime.prefetcher, PassPrefetcher)


def foreseen_experts(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[str, Signature | None]:
    """What says which experts each prompt uses, and what it says.

    Args:
        model: of `load`; a router over token ids foresees exactly, a predictor of passes as well as it can.
        prompts: their token ids.

    Returns:
        Its name and the signatures; an empty name and None if nothing foresees.
    """
    if any(hasattr(module, "plan_of_ids") for module in model.modules()):
        return "the model's own router", planned_signature(model, prompts)
    prefetcher = model.offload.runtime.prefetcher
    if not isinstance(prefetcher, PassPrefetcher):
        return "", None
    uses_NLE = np.stack([prefetcher.predictor.model.uses(prompt) for prompt in prompts])
    return "the predictor", uses_NLE.reshape(len(prompts), -1)


def planned_signature(model: Any, prompts: Sequence[Sequence[int]]) -> Signature:
    """Which experts each prompt will use in any layer, before the model has run: input of `form_batches`, [N, L * E].

    Raises:
        ValueError: if the model's experts do not follow from token ids alone.
    """
    import torch

    router: Any = next((module for module in model.modules() if hasattr(module, "plan_of_ids")), None)
    if router is None:
        raise ValueError(
            f"{type(model).__name__} has no router over token ids; record a trace and use `signatures` instead"
        )
    rows = []
    for prompt in prompts:
        uses_LE = np.zeros((router.num_routed_layers, router.num_experts), bool)
        with torch.no_grad():
            ids = router.plan_of_ids(torch.tensor([list(prompt)])).unique()
        uses_LE[:, ids.numpy()] = True
        rows.append(uses_LE.reshape(-1))
    return np.stack(rows)
