"""Whether two models compute the same logits, asked before one is written in place of the other.

Shapes: B sequences, S positions, V vocabulary.
"""

import copy
from typing import Any

import torch

PROBE_SEQUENCES, PROBE_LENGTH = 4, 48
"""Random tokens that are compared: 192 rows of 2 or more experts visit nearly all of 64 experts in every layer."""
TOLERANCE = 1e-4
"""Largest difference of float32 logits, over the largest logit: some hundred roundings, which is what another order of
the same sums makes. A wrong weight, rule or position moves logits by more than a tenth of the largest."""


@torch.no_grad()
def expect_same_function(ours: Any, theirs: Any, what: str) -> None:
    """Compare logits on a few random tokens, in float32: in bfloat16 rounding alone can turn a token to another expert.

    Args:
        ours, theirs: causal language models in evaluation mode, on one device; narrower ones are copied for this.
        what: names the second one in the message.

    Raises:
        ValueError: if they differ by more than TOLERANCE, or are not finite.
    """
    length = min(PROBE_LENGTH, ours.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    token_BS = torch.randint(ours.config.vocab_size, (PROBE_SEQUENCES, length), generator=generator).to(ours.device)
    logits, other = (_wide(model)(token_BS, use_cache=False).logits.double() for model in (ours, theirs))
    scale = float(logits.abs().max().clamp_min(1e-6))
    difference = float((logits - other).abs().max()) / scale
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{what} does not compute what the source computes: logits differ by {difference:.2g} of the largest, "
            f"where rounding explains {TOLERANCE:g}; nothing was written. Please report this model's config.json"
        )


def _wide(model: Any) -> Any:
    return model if model.dtype in (torch.float32, torch.float64) else copy.deepcopy(model).float()
