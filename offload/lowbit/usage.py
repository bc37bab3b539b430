"""How much each expert counts for its layer: by what the router gave it on a text, or in a trace.

Shapes: T tokens, K experts per token.
"""

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from .inputs import RecordedInputs


class Usage:
    """How much of each layer's output comes from each expert: routing weights squared, summed over tokens.

    Args:
        inputs: of a run over a text, or
        trace: a routing trace; without both, experts count alike.
    """

    def __init__(self, inputs: RecordedInputs | None = None, trace: RoutingTrace | None = None) -> None:
        self._inputs, self._trace = inputs, trace

    def squares(self, layer: int, num_experts: int) -> NDArray[np.float64]:
        """Of each expert of a layer; traces without weights count visits."""
        if self._inputs is not None:
            expert_TK, weight_TK = self._inputs.routing(layer)
        elif self._trace is not None:
            expert_TK = self._trace.expert_TLK[:, layer].astype(np.int64)
            stored = self._trace.weight_TLK
            weight_TK = np.ones(expert_TK.shape) if stored is None else stored[:, layer].astype(np.float64)
        else:
            return np.ones(num_experts)
        is_expert = (expert_TK >= 0) & (expert_TK < num_experts)
        square = np.square(weight_TK[is_expert].astype(np.float64))
        return np.bincount(expert_TK[is_expert], square, minlength=num_experts)
