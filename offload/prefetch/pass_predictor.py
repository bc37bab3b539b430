"""Reads the experts that a pass will probably use before it begins, and corrects itself while its layers run.

Before the pass, a transformer over the last token ids guesses the experts of all layers. When a layer is routed,
regressions on what it and the layer before chose correct the guesses of the next two: wrong reads that have not ended
are given up, new ones begin. Nothing that is computed depends on any guess.

Source: He et al. 2024 (ExpertFlow), arXiv:2410.17954.

Shapes: B sequences, S positions of a call, L MoE layers, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .pass_model import CONTEXT, PassModel
from .predictor import TrainedPredictor, likely_first, write_predictor
from .prefetch import Prefetcher


class PassPredictor:
    """A model of whole passes, and the regressions that correct it.

    Args:
        model: logits of all layers' experts from token ids.
        corrections: regressions on layers that are routed, with the model's logits among their inputs.
    """

    def __init__(self, model: PassModel, corrections: TrainedPredictor) -> None:
        self.model, self.corrections = model, corrections

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, atomically."""
        write_predictor(path, self.corrections.arrays() | self.model.arrays())

    @classmethod
    def of_arrays(
        cls, path: str | Path, stored: Mapping[str, NDArray[Any]], corrections: TrainedPredictor
    ) -> "PassPredictor":
        """What `save` wrote. Raises ValueError, which names the file, if it is something else."""
        try:
            model = PassModel.of_arrays(stored)
        except (KeyError, ValueError) as error:
            raise ValueError(f"predictor {path}: {error}") from error
        if (model.of.num_layers, model.of.num_experts) != (corrections.num_layers, corrections.num_experts):
            raise ValueError(f"predictor {path}: its two parts are of different models")
        return cls(model, corrections)


class LastTokens:
    """The last token ids of each sequence of the calls that are going on: at most CONTEXT."""

    def __init__(self) -> None:
        self._token_BS = np.zeros((0, 0), np.int64)
        self._length = 0

    def add(self, token_BS: NDArray[np.int64], past: int) -> NDArray[np.int64]:
        """The ids of a call behind those that came before it; gives what a prediction looks at.

        Args:
            token_BS: ids of the call.
            past: tokens of each sequence that the model has cached. Fewer than known: the cache was cropped. More, or
                other sequences: what came before is not known, and the call is taken for a beginning.
        """
        dropped = self._length - past
        kept = self._token_BS[:, : self._token_BS.shape[1] - dropped] if dropped > 0 else self._token_BS
        if past == 0 or dropped < 0 or len(kept) != len(token_BS):
            kept = token_BS[:, :0]
        self._token_BS = np.concatenate([kept, token_BS], axis=1)[:, -CONTEXT:]
        self._length = past + token_BS.shape[1]
        return self._token_BS


class PassPrefetcher(Prefetcher):
    """Follows the passes of one model.

    Args:
        predictor: guesses and corrects.
        most: experts of one layer that may be on their way.
    """

    def __init__(self, predictor: PassPredictor, most: int) -> None:
        super().__init__(predictor.corrections, most)
        self.predictor, self._tokens = predictor, LastTokens()
        self._logit_LE: NDArray[np.float32] | None = None
        """Of the one token of the pass that is going on; None in prompts and batches."""

    def attach(self, model: Any, ahead: Any) -> None:
        """Guess before each call of the model."""

        # a compiler would trace the prediction
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._begin(ahead, kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values"))

        model.register_forward_pre_hook(begin, with_kwargs=True)

    def look_ahead(self, layer: int, x_1D: Any, expert_1K: Any, layers: Sequence[Any]) -> None:
        """Now that `layer` is routed: correct what was guessed of the next ones."""
        num_experts = layers[layer].num_experts
        corrections = self.predictor.corrections
        corrections.note(layer, [expert for expert in expert_1K[0].tolist() if 0 <= expert < num_experts])
        if not self.is_active or self._logit_LE is None:
            return
        for ahead in corrections.distances:
            if layer + ahead < len(layers):
                before_E = self._logit_LE[layer + ahead]
                likely = likely_first(corrections.probability_E(layer + ahead, ahead, before_E))
                layers[layer + ahead].keep_ahead(likely)
                for expert in likely[: self._most]:
                    layers[layer + ahead].read_ahead(expert, likely, self._most)

    def _begin(self, ahead: Any, tokens: Any, cache: Any) -> None:
        self._logit_LE = None
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or not tokens.numel():
            return
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        known_BS = self._tokens.add(tokens.cpu().numpy().astype(np.int64), past)
        if not self.is_active:
            return
        logit_BSLE = self.predictor.model.logits(known_BS)[:, -tokens.shape[1] :]
        logit_NLE = logit_BSLE.reshape(-1, *logit_BSLE.shape[2:])
        if len(logit_NLE) == 1:
            self._logit_LE = logit_NLE[0]
        # an expert is used if any token uses it
        unused_LE = (1 / (1 + np.exp(logit_NLE.astype(np.float64)))).prod(axis=0)
        ahead.expect_use(1 - unused_LE, self._most)
