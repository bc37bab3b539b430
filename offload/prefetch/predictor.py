"""A small predictor of the next layers' experts, trained from a trace: one logistic regression per layer and distance.

What it sees is what a runtime knows for nothing: which experts this token visited in the two layers before, and which
ones the token before it visited in the layer in question. Source of the idea: ExpertFlow, arXiv:2410.17954, whose
predictor is a transformer; a linear one costs microseconds.

Shapes: L MoE layers, E experts, A distances, V = 3 E inputs. Without torch.
"""

import zipfile
from collections.abc import Mapping, Sequence
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
LIKELY_LOGIT = float(np.log(LIKELY / (1 - LIKELY)))
"""The same as a logit."""
MOST_BYTES = 256 << 20
"""Of a file: 24 layers of 32 experts take 0.6 MB, 60 layers of 256 experts 94 MB."""
FORMAT = 1
"""Version of the file."""


class TrainedPredictor:
    """Guesses experts that are likelier than not.

    Args:
        weight_ALVE: float32, per distance and layer the weight of each input for each expert.
        bias_ALE: float32.
        scale_AL: float32, what counts of the logits of another predictor, which these regressions correct; None if
            there is no other.
    """

    distances = AHEAD

    def __init__(
        self,
        weight_ALVE: NDArray[np.float32],
        bias_ALE: NDArray[np.float32],
        scale_AL: NDArray[np.float32] | None = None,
    ) -> None:
        self.weight_ALVE, self.bias_ALE = weight_ALVE, bias_ALE
        self.scale_AL = np.zeros(bias_ALE.shape[:2], np.float32) if scale_AL is None else scale_AL
        _, self.num_layers, self.num_experts = bias_ALE.shape
        self._latest: list[list[int]] = [[] for _ in range(self.num_layers)]

    def note(self, layer: int, experts: Sequence[int]) -> None:
        """This token's experts of one layer; layers come in order."""
        self._latest[layer] = list(experts)

    def probability_E(self, layer: int, ahead: int, before_E: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """How likely each expert of `layer` is, when layer - ahead has just been noted.

        Args:
            before_E: logits of the predictor that is corrected.
        """
        E, last = self.num_experts, layer - ahead
        active = [*self._latest[last]]
        if last > 0:
            active += [E + expert for expert in self._latest[last - 1]]
        active += [2 * E + expert for expert in self._latest[layer]]
        place = AHEAD.index(ahead)
        logit_E = self.bias_ALE[place, layer] + self.weight_ALVE[place, layer, active].sum(axis=0)
        if before_E is not None:
            logit_E = logit_E + self.scale_AL[place, layer] * before_E
        return 1 / (1 + np.exp(-logit_E))

    def predict(self, layer: int, ahead: int, x_1D: Any) -> list[int]:
        """Experts of `layer` that are likelier than not, the likeliest first."""
        return likely_first(self.probability_E(layer, ahead))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a file keeps of it."""
        return {"weight_ALVE": self.weight_ALVE, "bias_ALE": self.bias_ALE, "scale_AL": self.scale_AL}

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, atomically."""
        write_predictor(path, self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> "TrainedPredictor":
        """Read what `save` wrote. Raises ValueError if it is something else."""
        return cls.of_arrays(path, read_predictor(path))

    @classmethod
    def of_arrays(cls, path: str | Path, stored: Mapping[str, NDArray[Any]]) -> "TrainedPredictor":
        """What `arrays` gave. Raises ValueError, which names the file, if it is something else."""
        weight, bias = stored["weight_ALVE"], stored["bias_ALE"]
        scale = stored.get("scale_AL", np.zeros(bias.shape[:2]))
        expected = (*bias.shape[:2], SOURCES * bias.shape[-1], bias.shape[-1])
        is_sound = bias.ndim == 3 and len(bias) == len(AHEAD) and weight.shape == expected
        is_sound = is_sound and scale.shape == bias.shape[:2]
        if not is_sound or not all(np.isfinite(array).all() for array in (weight, bias, scale)):
            raise ValueError(f"predictor {path}: shapes {weight.shape} and {bias.shape} do not fit")
        return cls(weight.astype(np.float32), bias.astype(np.float32), scale.astype(np.float32))

    def expect(self, num_layers: int, num_experts: int) -> "TrainedPredictor":
        """Itself. Raises ValueError if it was trained for a model of other sizes."""
        if (self.num_layers, self.num_experts) != (num_layers, num_experts):
            raise ValueError(
                f"the predictor is for {self.num_layers} layers of {self.num_experts} experts; "
                f"this model has {num_layers} of {num_experts}"
            )
        return self


def likely_first(probability_E: NDArray[np.float32]) -> list[int]:
    """Experts that are likelier than not, the likeliest first."""
    return [int(expert) for expert in np.argsort(-probability_E) if probability_E[expert] >= LIKELY]


def write_predictor(path: str | Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays of a predictor as `.npz`, atomically."""
    with atomic_write(path, "wb") as file:
        np.savez(file, allow_pickle=False, version=np.array(FORMAT), **arrays)


def read_predictor(path: str | Path) -> dict[str, NDArray[Any]]:
    """The arrays of a predictor's file.

    Raises:
        ValueError: if it is none, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"predictor {path}: no such file; make one with `expertier trace predictor`")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"predictor {path}: larger than {MOST_BYTES} bytes, so not a predictor")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        version = int(arrays.pop("version"))
        missing = {"weight_ALVE", "bias_ALE"} - arrays.keys()
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"predictor {path}: not a file of `expertier trace predictor`") from error
    if version != FORMAT or missing:
        raise ValueError(f"predictor {path}: version {version} without {sorted(missing)}; expected version {FORMAT}")
    return arrays


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
