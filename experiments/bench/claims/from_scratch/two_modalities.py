"""Mixture-of-Transformers on two real modalities: text, and recorded series in 64 levels, in one sequence.

Shapes: B sequences, S positions.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..claim import Row, fit, small_decoder
from ..domains import training_part
from .series import TRAINING_SHARE, recorded

if TYPE_CHECKING:
    from torch import Tensor

# toy sizes that a core trains in a minute, chosen once
TEXT, SERIES, LEVELS, BATCH, RATE, HELD_OUT_ROWS = 40, 40, 64, 16, 3e-3, 96
FIRST_LEVEL = 256
"""Ids below are bytes, ids from here on levels of a series."""


def mixture_of_transformers_rows(steps: int, seed: int) -> list[Row]:
    """Weights by modality, and one dense model whose every token takes as many operations."""
    own = {
        "architecture": "mixture_of_transformers",
        "architecture_options": {"first_ids": [0, FIRST_LEVEL]},
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 96,
    }
    dense = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 96}
    return [
        {"variant": name, **_losses(settings, steps, seed)}
        for name, settings in (("weights by modality", own), ("dense, equal operations", dense))
    ]


def _losses(settings: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    model = MoEForCausalLM(MoEConfig(**small_decoder(vocab_size=FIRST_LEVEL + LEVELS) | settings)).train()
    draws = np.random.default_rng(seed)

    def loss_of(step: int) -> "Tensor":
        token_BS = rows_of(BATCH, draws, held_out=False)
        return model(token_BS, labels=token_BS, use_cache=False).loss

    fit(model.parameters(), loss_of, steps, RATE)
    model.eval()
    token_BS = rows_of(HELD_OUT_ROWS, np.random.default_rng(10_000 + seed), held_out=True)
    with torch.no_grad():
        logits = model(token_BS, use_cache=False).logits[:, :-1]
    target = token_BS[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") / np.log(2)
    is_text = target.flatten() < FIRST_LEVEL
    return {
        "bits_text": loss[is_text].mean().item(),
        "bits_series": loss[~is_text].mean().item(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def rows_of(count: int, draws: np.random.Generator, *, held_out: bool) -> "Tensor":
    """int64 [B, S]: text and a window of a series, which of both comes first is drawn; the text ends with its name."""
    import torch

    text, rows, series = _text(held_out), [], recorded()
    for name in draws.choice(list(series), count):
        values = series[str(name)]
        border = round(TRAINING_SHARE * len(values))
        part = values[border:] if held_out else values[:border]
        start = draws.integers(0, len(part) - SERIES)
        label = f"\n{name}:".encode()
        place = draws.integers(0, len(text) - TEXT)
        words = np.concatenate([text[place : place + TEXT - len(label)], np.frombuffer(label, np.uint8)])
        pieces = [words.astype(np.int64), levels_of(part[start : start + SERIES])]
        rows.append(np.concatenate(pieces if draws.random() < 0.5 else pieces[::-1]))
    return torch.from_numpy(np.stack(rows))


def levels_of(window: np.ndarray) -> np.ndarray:
    """int64: a window in 64 levels between its least and its largest value."""
    span = max(float(np.ptp(window)), 1e-6)
    return FIRST_LEVEL + np.minimum(((window - window.min()) / span * LEVELS).astype(np.int64), LEVELS - 1)


def _text(held_out: bool) -> np.ndarray:
    """Prose: the first four fifths of a domain's training part to train on, the rest to score."""
    whole = training_part("prose")
    border = len(whole) * 4 // 5
    return whole[border:] if held_out else whole[:border]
