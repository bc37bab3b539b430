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
"""Reads ahead before the first judgement, and the share of them that has to be of use from then on. A useless read
costs disk time and a slot. 256 reads are about five tokens of 24 layers with two guesses each. The trained predictor
had 72 % of use and gained 2 to 14 % in four pairs (experiments/records/2026-11-21_offload-speed); where the limit
should lie was not measured."""


class Predictor(Protocol):
    """Guesses a layer's experts, the likeliest first, from the layers before it."""

    @property
    def distances(self) -> tuple[int, ...]:
        """How many layers ahead it guesses, each."""

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """The experts that one token visits in a layer; layers come in order."""
        ...

    def predict(self, layer: int, ahead: int, x_1D: Any) -> list[int]:
        """The experts of `layer`, when layer - ahead has just been noted, with the input of that layer's experts."""
        ...


class GatePredictor:
    """The next layer's own router on this layer's input.

    Args:
        routers: weight `[E, D]` and selection bias `[E]` (or None) of each MoE layer's router; None where a layer has
            none that looks like one.
        top_k: experts to guess.
    """

    distances = (1,)

    def __init__(self, routers: Sequence[tuple[Any, Any] | None], top_k: int) -> None:
        self._routers, self._top_k = routers, top_k

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """It has no memory."""

    def predict(self, layer: int, ahead: int, x_1D: Any) -> list[int]:
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
        num_layers: L, MoE layers of the model.
        num_experts: E of the widest layer; counts take 8 L E^2 bytes.
        top_k: experts to guess.
    """

    distances = (1,)

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._counts = np.ones((num_layers, num_experts, num_experts))
        self._top_k = top_k
        self._latest: tuple[int, list[int]] | None = None

    def note(self, layer: int, experts: Sequence[int]) -> None:
        if self._latest is not None and self._latest[0] == layer - 1:
            self._counts[np.ix_([layer], self._latest[1], list(experts))] += 1
        self._latest = (layer, list(experts))

    def predict(self, layer: int, ahead: int, x_1D: Any) -> list[int]:
        assert self._latest is not None
        rows = self._counts[layer, self._latest[1]]
        score_E = np.log(rows / rows.sum(axis=1, keepdims=True)).sum(axis=0)
        return [int(expert) for expert in np.argsort(-score_E)[: self._top_k]]


class Prefetcher:
    """Reads the likeliest missing experts of the next layers with what the disk has to spare; stops if it does not pay.

    Args:
        predictor: guesses the experts.
        most: experts that may be on their way for one layer.
    """

    def __init__(self, predictor: Predictor, most: int) -> None:
        self._predictor, self._most = predictor, most
        self.is_active = True

    def attach(self, model: Any, ahead: Any) -> None:
        """When the model is ready; guessing needs nothing more than its calls."""

    def look_ahead(self, layer: int, x_1D: Any, expert_1K: Any, layers: Sequence[Any]) -> None:
        """Now that `layer` is routed: start reading what the layers after it will probably ask for and do not have."""
        num_experts = layers[layer].num_experts
        self._predictor.note(layer, [expert for expert in expert_1K[0].tolist() if 0 <= expert < num_experts])
        if not self.is_active:
            return
        for ahead in self._predictor.distances:
            if layer + ahead < len(layers):
                guessed = self._predictor.predict(layer + ahead, ahead, x_1D)
                for expert in guessed[: self._most]:
                    layers[layer + ahead].read_ahead(expert, guessed, self._most)

    def judge(self, issued: int, useful: int, late: int) -> None:
        """Give up once enough was tried and too little of it was of use."""
        if issued >= PROBATION and useful + late < LEAST_USEFUL * issued:
            self.is_active = False
