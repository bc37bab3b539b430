"""Whether two models compute the same logits, asked before one is written in place of the other.

Shapes: B sequences, S positions, V vocabulary.
"""

from typing import Any

import torch

PROBE_SEQUENCES, PROBE_LENGTH = 4, 48
"""Random tokens that are compared: 192 rows of 2 or more experts visit nearly all of 64 experts in every layer."""
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference, over the largest logit: some hundred roundings of the dtype, which is what another order of the
same sums makes. A wrong weight, rule or position moves logits by more than a tenth of the largest."""


@torch.no_grad()
def expect_same_function(ours: Any, theirs: Any, what: str) -> None:
    """Compare logits on a few random tokens.

    Args:
        ours, theirs: causal language models in evaluation mode, on one device, in one dtype.
        what: names the second one in the message.

    Raises:
        ValueError: if they differ by more than the tolerance of the dtype, or are not finite.
    """
    length = min(PROBE_LENGTH, ours.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    token_BS = torch.randint(ours.config.vocab_size, (PROBE_SEQUENCES, length), generator=generator).to(ours.device)
    logits, other = (model(token_BS, use_cache=False).logits.double() for model in (ours, theirs))
    scale = float(logits.abs().max().clamp_min(1e-6))
    difference = float((logits - other).abs().max()) / scale
    tolerance = TOLERANCES[ours.dtype]
    if not difference <= tolerance:
        raise ValueError(
            f"{what} does not compute what the source computes: logits differ by {difference:.2g} of the largest, "
            f"where rounding explains {tolerance:g}; nothing was written. Please report this model's config.json"
        )
