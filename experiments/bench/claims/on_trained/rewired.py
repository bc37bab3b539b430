"""Rewiring: does fitting router offsets to a context lower the loss of the bytes that follow it?

Shapes: B sequences, S positions.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any

import numpy as np

from ..claim import Row, small_decoder
from ..domains import held_out_rows, tune

SEEN, UNSEEN = ("prose", "python", "tables"), ("changes", "markup")
CONTEXT, NEXT = 96, 32
"""The paper fits again after 128 tokens of a model with 16 times the layers' width; rows here are 128 bytes in all."""
ROWS = 8
"""Of each domain."""
SELECTIONS = ("all", "hard", "soft")
AS_TRAINED = "as trained"


def rewired_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte of what follows a context, as trained and with offsets of all, of half and of weighed layers."""
    import torch

    from moe import MoEConfig, MoEForCausalLM, Rewiring

    torch.manual_seed(seed)
    sizes = small_decoder(vocab_size=256, num_hidden_layers=4, num_experts=8, router="mixtral")
    model = MoEForCausalLM(MoEConfig(**sizes))
    tune(model, SEEN, steps, seed, length=CONTEXT + NEXT)
    model.requires_grad_(False)
    settings = {AS_TRAINED: None, **{f"rewired, {name}": Rewiring(selection=name) for name in SELECTIONS}}
    return [
        {"variant": name, "bits_seen": _bits(model, SEEN, one), "bits_unseen": _bits(model, UNSEEN, one)}
        for name, one in settings.items()
    ]


def _bits(model: Any, domains: Sequence[str], settings: Any) -> float:
    """Mean over the bytes after the context, each context fitted by itself."""
    return fmean(
        _following(model, token_S[None], settings)
        for name in domains
        for token_S in held_out_rows(name, CONTEXT + NEXT, ROWS)
    )


def _following(model: Any, token_1S: Any, settings: Any) -> float:
    import torch

    from moe import rewired

    with rewired(model, token_1S[:, :CONTEXT], settings) if settings else nullcontext(), torch.no_grad():
        logits = model(token_1S, use_cache=False).logits[0, CONTEXT - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), token_1S[0, CONTEXT:]).item() / float(np.log(2))
