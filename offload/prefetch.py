"""Which experts the next layer will ask for, before it does.

Without torch at import: the gate predictor uses whatever tensors the model hands it.
Sources: next layer's gate on the current hidden state, Eliseev and Mazur 2023 (arXiv:2312.17238) and HOBBIT
(arXiv:2411.01433); transitions between layers, ExFlow (arXiv:2401.08383).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

PREDICTORS = ("gate", "transitions", "plan")
PROBATION, LEAST_USEFUL = 256, 0.5


class Predictor(Protocol):
    """Guesses a layer's experts, the likeliest first, from the layer before it."""

    def predict(self, layer: int, x_1D: Any, experts: Sequence[int]) -> list[int]: ...


class GatePredictor:
    """The next layer's own router on this layer's input.

    Args:
        routers: weight `[E, D]` and selection bias `[E]` (or None) of each MoE layer's router; None where a layer has
            none that looks like one.
        top_k: experts to guess.
    """

    def __init__(self, routers: Sequence[tuple[Any, Any] | None], top_k: int) -> None:
        self._routers, self._top_k = routers, top_k

    def predict(self, layer: int, x_1D: Any, experts: Sequence[int]) -> list[int]:
        router = self._routers[layer]
        if router is None:
            return []
        weight_ED, bias_E = router
        logits_1E = x_1D.to(weight_ED.dtype) @ weight_ED.t()
        scores_1E = logits_1E if bias_E is None else logits_1E.sigmoid() + bias_E
        return list(scores_1E.topk(min(self._top_k, scores_1E.shape[-1])).indices[0].tolist())


class TransitionPredictor:
    """Experts that followed this layer's experts before, counted while the model runs.

    Args:
        num_layers: L.
        num_experts: E.
        top_k: experts to guess.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._counts = np.ones((num_layers, num_experts, num_experts))
        self._top_k = top_k
        self._before: tuple[int, Sequence[int]] | None = None

    def predict(self, layer: int, x_1D: Any, experts: Sequence[int]) -> list[int]:
        """Also learns: `experts` are those of layer - 1, which followed those of the call before."""
        if self._before is not None and self._before[0] == layer - 1:
            self._counts[np.ix_([layer - 1], self._before[1], experts)] += 1
        self._before = (layer, list(experts))
        rows = self._counts[layer, list(experts)]
        score_E = np.log(rows / rows.sum(axis=1, keepdims=True)).sum(axis=0)
        return [int(expert) for expert in np.argsort(-score_E)[: self._top_k]]


class Prefetcher:
    """Reads the likeliest missing experts of the next layer with what the disk has to spare; stops if it does not pay.

    Args:
        predictor: guesses the experts.
        most: experts that may be on their way for one layer.
    """

    def __init__(self, predictor: Predictor, most: int) -> None:
        self._predictor, self._most = predictor, most
        self.is_active = True

    def attach(self, model: Any, runtime: Any) -> None:
        """When the model is ready; guessing needs nothing more than its calls."""

    def look_ahead(self, layer: int, x_1D: Any, expert_1K: Any, slots: Any) -> None:
        """Guess `layer`'s experts and start reading those that are missing."""
        experts = [expert for expert in expert_1K[0].tolist() if 0 <= expert < slots.num_experts]
        guessed = self._predictor.predict(layer, x_1D, experts)
        if not self.is_active:
            return
        for expert in guessed[: self._most]:
            slots.read_ahead(expert, guessed, self._most)

    def judge(self, issued: int, useful: int, late: int) -> None:
        """Give up once enough was tried and too little of it was of use."""
        if issued >= PROBATION and useful + late < LEAST_USEFUL * issued:
            self.is_active = False
