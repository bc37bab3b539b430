"""A model of all layers' experts: a small causal transformer that reads token ids before the pass that routes them.

Source: He et al. 2024 (ExpertFlow), arXiv:2410.17954, whose routing-path predictor is a transformer over tokens.

Shapes: B sequences, S positions, T = B * S tokens, L MoE layers, E experts, D width of the transformer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe import MoEConfig, TokenTransformer, context_of

from .predictor import LIKELY_LOGIT

CONTEXT = 32
"""Tokens that a prediction looks back on. Each step computes all of them anew, 10 million products at the sizes below,
so that there is no state but ids. Longer contexts were not tried."""
WIDTH, HEADS, BLOCKS = 64, 4, 2
"""Of the transformer; the published one is of T5's kind and larger. Other sizes were not tried."""
MOST_VALUES = 64 << 20
"""Of one array of a file: the embedding of a vocabulary of a million."""


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """Of the model that is predicted: ids that there are, MoE layers, experts of the widest."""

    vocab_size: int
    num_layers: int
    num_experts: int

    def __post_init__(self) -> None:
        if (
            min(astuple(self)) < 1
            or max(self.vocab_size * WIDTH, self.num_layers * self.num_experts * WIDTH) > MOST_VALUES
        ):
            raise ValueError(f"a predictor of a pass cannot have these sizes: {self}")

    @property
    def config(self) -> MoEConfig:
        """Of the transformer."""
        return MoEConfig(
            vocab_size=self.vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=WIDTH // HEADS,
            qk_norm="none",
        )


class PassModel(TokenTransformer):
    """Logits of every expert of every layer, of each token from the ids up to it.

    Args:
        sizes: of the model that is predicted.
    """

    def __init__(self, sizes: PassSizes) -> None:
        super().__init__(sizes.vocab_size, sizes.config)
        self.of = sizes
        self.head = nn.Linear(WIDTH, sizes.num_layers * sizes.num_experts)

    def forward(self, token_BS: Tensor) -> Tensor:
        """[B, S, L, E]; S is at most CONTEXT for what it was trained for."""
        logit_TR: Tensor = self.head(self.normed(context_of(token_BS)))
        return logit_TR.view(*token_BS.shape, self.of.num_layers, self.of.num_experts)

    @torch.no_grad()
    def logits(self, token_BS: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same without gradients; ids beyond the vocabulary that it knows count as the last one."""
        known_BS = torch.from_numpy(token_BS).clamp(0, self.of.vocab_size - 1)
        logit_BSLE: NDArray[np.float32] = self(known_BS).numpy()
        return logit_BSLE

    def uses(self, token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """[L, E]: the experts that some token of a text is likely to use; each CONTEXT tokens are looked at alone."""
        use_LE = np.zeros((self.of.num_layers, self.of.num_experts), bool)
        for start in range(0, len(token_ids), CONTEXT):
            logit_SLE = self.logits(np.array([token_ids[start : start + CONTEXT]], np.int64))[0]
            use_LE |= (logit_SLE >= LIKELY_LOGIT).any(axis=0)
        return use_LE

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a file keeps of it."""
        weights = {f"pass.{name}": tensor.numpy() for name, tensor in self.state_dict().items()}
        return {"pass_sizes": np.array(astuple(self.of)), **weights}

    @classmethod
    def of_arrays(cls, stored: Mapping[str, NDArray[Any]]) -> "PassModel":
        """What `arrays` gave.

        Raises:
            ValueError: if an array is missing, of another shape, or not finite.
        """
        sizes = stored["pass_sizes"]
        if sizes.shape != (3,) or not np.issubdtype(sizes.dtype, np.integer):
            raise ValueError(f"pass_sizes must be three integers; got {sizes.dtype} {sizes.shape}")
        vocab_size, num_layers, num_experts = sizes.tolist()
        model = cls(PassSizes(vocab_size=vocab_size, num_layers=num_layers, num_experts=num_experts))
        for name, tensor in model.state_dict().items():
            array = stored[f"pass.{name}"]
            if array.shape != tuple(tensor.shape) or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite numbers of shape {tuple(tensor.shape)}; got {array.shape}")
            tensor.copy_(torch.from_numpy(array))
        return model.eval().requires_grad_(False)
