"""A small predictor of the next layers' experts, trained from a trace: one logistic regression per layer and distance.

What it sees is what a runtime knows for nothing: which experts this token visited in the two layers before, and which
ones the token before it visited in the layer in question. Source of the idea: ExpertFlow, arXiv:2410.17954, whose
predictor is a transformer; a linear one costs microseconds.

Shapes: L MoE layers, E experts, A distances, V = 3 E inputs. Without torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.files import atomic_write
from routing.traces import RoutingTrace

AHEAD = (1, 2)
"""Layers from the one that is routed to the one that is guessed. Two layers give the disk more time; 81 % of the
guesses are right there, 82 % one layer ahead (experiments/records/2026-11-29_cache-policies). Three were not tried."""
SOURCES = 3
"""The layer that was routed last, the one before it, and the layer in question one token earlier."""
LIKELY = 0.5
"""Least probability of a guess: at 0.5 a read is of use more often than not. Lower ones read more and waste more; they
were not tried."""
MOST_BYTES = 256 << 20
"""Of a file: 24 layers of 32 experts take 0.6 MB, 60 layers of 256 experts 94 MB."""
FORMAT = 1
"""Version of the file."""


class TrainedPredictor:
    """Guesses experts that are likelier than not.

    Args:
        weight_ALVE: float32, per distance and layer the weight of each input for each expert.
        bias_ALE: float32.
    """

    distances = AHEAD

    def __init__(self, weight_ALVE: NDArray[np.float32], bias_ALE: NDArray[np.float32]) -> None:
        self.weight_ALVE, self.bias_ALE = weight_ALVE, bias_ALE
        _, self.num_layers, self.num_experts = bias_ALE.shape
        self._latest: list[list[int]] = [[] for _ in range(self.num_layers)]

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """This token's experts of one layer; layers come in order."""
        self._latest[layer] = list(experts)

    def probability_E(self, layer: int, ahead: int) -> NDArray[np.float32]:
        """How likely each expert of `layer` is, when layer - ahead has just been noted."""
        E, last = self.num_experts, layer - ahead
        active = [*self._latest[last]]
        if last > 0:
            active += [E + expert for expert in self._latest[last - 1]]
        active += [2 * E + expert for expert in self._latest[layer]]
        place = AHEAD.index(ahead)
        logit_E = self.bias_ALE[place, layer] + self.weight_ALVE[place, layer, active].sum(axis=0)
        return 1 / (1 + np.exp(-logit_E))

    def predict(self, layer: int, ahead: int, x_1D: Any) -> list[int]:
        """Experts of `layer` that are likelier than not, the likeliest first."""
        probability_E = self.probability_E(layer, ahead)
        return [int(expert) for expert in np.argsort(-probability_E) if probability_E[expert] >= LIKELY]

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, atomically."""
        with atomic_write(path, "wb") as file:
            np.savez(file, version=np.array(FORMAT), weight_ALVE=self.weight_ALVE, bias_ALE=self.bias_ALE)

    @classmethod
    def load(cls, path: str | Path) -> "TrainedPredictor":
        """Read what `save` wrote. Raises ValueError if it is something else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"predictor {path}: no such file; make one with `expertier trace predictor`")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"predictor {path}: larger than {MOST_BYTES} bytes, so not a predictor")
        try:
            with np.load(path, allow_pickle=False) as stored:
                version, weight, bias = (stored[name] for name in ("version", "weight_ALVE", "bias_ALE"))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"predictor {path}: not a file of `expertier trace predictor`") from error
        expected = (*bias.shape[:2], SOURCES * bias.shape[-1], bias.shape[-1])
        is_sound = bias.ndim == 3 and len(bias) == len(AHEAD) and weight.shape == expected
        if int(version) != FORMAT or not is_sound or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError(f"predictor {path}: version {version}, shapes {weight.shape} and {bias.shape} do not fit")
        return cls(weight.astype(np.float32), bias.astype(np.float32))

    def expect(self, num_layers: int, num_experts: int) -> "TrainedPredictor":
        """Itself. Raises ValueError if it was trained for a model of other sizes."""
        if (self.num_layers, self.num_experts) != (num_layers, num_experts):
            raise ValueError(
                f"the predictor is for {self.num_layers} layers of {self.num_experts} experts; "
                f"this model has {num_layers} of {num_experts}"
            )
        return self


def hot_TLE(trace: RoutingTrace) -> NDArray[np.float32]:
    """1 where a token visits an expert."""
    hot = np.zeros((*trace.expert_TLK.shape[:2], trace.num_experts + 1), np.float32)
    np.put_along_axis(hot, np.where(trace.expert_TLK < 0, trace.num_experts, trace.expert_TLK).astype(np.int64), 1, 2)
    return hot[..., :-1]


def inputs_TV(hot: NDArray[np.float32], is_first_T: NDArray[np.bool_], layer: int, ahead: int) -> NDArray[np.float32]:
    """What the predictor sees before `layer` when layer - ahead has just been routed, for every token of a trace."""
    last = layer - ahead
    before = np.zeros_like(hot[:, layer])
    before[1:] = np.where(is_first_T[1:, None], 0, hot[:-1, layer])
    earlier = hot[:, last - 1] if last > 0 else np.zeros_like(before)
    return np.concatenate([hot[:, last], earlier, before], axis=1)
