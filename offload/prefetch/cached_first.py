"""Cache-conditional re-ranking: experts that are in slots get a bonus before the K best are chosen. Lossy.

It is here as a yardstick: a router trained for locality has to beat what this gets from any router for nothing.
Source: Skliar et al. 2024 (Qualcomm), arXiv:2412.00099, section 3 (cache-prior): the bonus is a share of the range of
the token's logits, and weights stay those of the logits without it.

Shapes: T tokens, K experts per token, E experts.
"""

from typing import Any

import torch
from torch import nn

from routing import top_experts

from .softmax_gates import SoftmaxGate, chosen, softmax_gates, with_choice


class CachedFirst:
    """Changes what routers choose while single tokens are decoded; counts what it changed.

    Args:
        strength: the bonus over the range of a token's logits, 0..1; 1 leaves no choice but among cached experts.

    Raises:
        ValueError: if the strength is out of range.
    """

    def __init__(self, strength: float) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"the strength of preferring cached experts must lie in 0..1; got {strength}")
        self.strength = strength
        self.num_choices = self.num_changed = 0

    def attach(self, model: nn.Module, runtime: Any) -> None:
        """Follow every router of the model.

        Raises:
            ValueError: if a router is no softmax over a linear map.
        """
        for layer, gate in enumerate(softmax_gates(model)):

            def prefer(_: Any, inputs: Any, result: Any, gate: SoftmaxGate = gate, layer: int = layer) -> Any:
                return self._preferring(gate, runtime.layers[layer], inputs[0], result)

            gate.router.register_forward_hook(prefer)

    def report(self) -> dict[str, Any]:
        """What was done, JSON-serialisable; `exactness` says that the output is not the model's."""
        return {
            "exactness": "lossy",
            "strength": self.strength,
            "choices": self.num_choices,
            "changed": self.num_changed,
        }

    def _preferring(self, gate: SoftmaxGate, slots: Any, x: torch.Tensor, result: Any) -> Any:
        expert_TK, _ = chosen(result)
        if len(expert_TK) != 1 or not self.strength:
            return result
        logit_TE = gate.logits(x)
        cached_E = torch.tensor([expert in slots for expert in range(logit_TE.shape[1])], device=logit_TE.device)
        range_T1 = logit_TE.amax(dim=-1, keepdim=True) - logit_TE.amin(dim=-1, keepdim=True)
        preferred_TK = top_experts(logit_TE + self.strength * range_T1 * cached_E, expert_TK.shape[1])
        self.num_choices += preferred_TK.numel()
        self.num_changed += int((preferred_TK[:, :, None] != expert_TK[:, None, :]).all(dim=2).sum())
        return with_choice(result, preferred_TK, gate.weights(logit_TE, preferred_TK))
