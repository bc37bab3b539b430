"""What two models predict for the same text, compared token by token; only one of them is in memory at a time.

The first model's logits wait on disk. Shapes: T tokens of a sequence, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

CONFIDENCE = 0.95
"""Of intervals; what most papers state."""
PIECE_TOKENS = 64
"""Tokens whose logits are compared at once: 64 of a vocabulary of 150,000 take 40 MB in float32, and some copies."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """How one model's predictions differ from a reference's.

    Args:
        tokens: that were predicted.
        reference_loss: mean negative log-likelihood of the reference, nats per token.
        loss: the same of the model.
        loss_difference: the model's less the reference's.
        interval: in which the difference lies with a confidence of 95 %, from the spread between sequences (Student's
            t); None with a single sequence.
        agreement: share of the tokens whose most likely successor is the same.
        divergence: mean Kullback-Leibler divergence of the model from the reference, nats per token.
        worst_divergence: the largest of a token.
    """

    tokens: int
    reference_loss: float
    loss: float
    loss_difference: float
    interval: tuple[float, float] | None
    agreement: float
    divergence: float
    worst_divergence: float


def spool_logits(
    model: Any, sequences: Sequence[Sequence[int]], folder: Path, progress: Callable[[int], None] = lambda tokens: None
) -> None:
    """Write the logits of every sequence to a file of its own, in their own dtype.

    Args:
        model: of `load`.
        sequences: token ids.
        folder: takes the files.
        progress: told the tokens of each sequence.
    """
    for number, sequence in enumerate(sequences):
        logits_TV = _logits(model, sequence)
        as_bytes = logits_TV.contiguous().view(torch.uint8).numpy()
        np.save(folder / f"{number}.npy", as_bytes)
        progress(len(sequence))


def compare_predictions(
    model: Any,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Predictions:
    """Compare a model's logits with those that `spool_logits` left.

    Args:
        model: of `load`.
        sequences: the same token ids.
        folder: with the reference's files.
        dtype: of the reference's logits.
        progress: told the tokens of each sequence.

    Raises:
        ValueError: if the models have different vocabularies.
    """
    rows = []
    for number, sequence in enumerate(sequences):
        stored = torch.from_numpy(np.load(folder / f"{number}.npy", mmap_mode="c")).view(dtype)
        logits_TV = _logits(model, sequence)
        if stored.shape != logits_TV.shape:
            raise ValueError(
                f"the models have vocabularies of {stored.shape[-1]} and {logits_TV.shape[-1]} tokens; only models of "
                "one tokenizer are compared"
            )
        rows.append(_compared(stored, logits_TV, sequence))
        progress(len(sequence))
    return _summary(rows)


def _logits(model: Any, sequence: Sequence[int]) -> torch.Tensor:
    """Of every position but the last, which predicts nothing that is there, `[T - 1, V]`."""
    with torch.no_grad():
        logits_TV: torch.Tensor = model(torch.tensor([list(sequence)], device=model.device), use_cache=False).logits[0]
    return logits_TV[:-1].cpu()


def _compared(reference_TV: torch.Tensor, model_TV: torch.Tensor, sequence: Sequence[int]) -> torch.Tensor:
    """For each token the reference's loss, the model's, whether they agree, and the divergence: `[T - 1, 4]`."""
    next_T = torch.tensor(list(sequence[1:]))
    return torch.cat(list(_compared_pieces(reference_TV, model_TV, next_T)))


def _compared_pieces(
    reference_TV: torch.Tensor, model_TV: torch.Tensor, next_T: torch.Tensor
) -> Iterator[torch.Tensor]:
    for begin in range(0, len(next_T), PIECE_TOKENS):
        piece = slice(begin, begin + PIECE_TOKENS)
        log_p_TV, log_q_TV = (logits[piece].float().log_softmax(-1) for logits in (reference_TV, model_TV))
        wanted_T1 = next_T[piece, None]
        yield torch.stack(
            [
                -log_p_TV.gather(1, wanted_T1)[:, 0],
                -log_q_TV.gather(1, wanted_T1)[:, 0],
                (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).float(),
                (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).clamp_min(0),
            ],
            dim=1,
        ).double()


def _summary(rows: Sequence[torch.Tensor]) -> Predictions:
    whole = torch.cat(list(rows))
    reference, loss, agreement, divergence = (float(mean) for mean in whole.mean(0))
    return Predictions(
        tokens=len(whole),
        reference_loss=reference,
        loss=loss,
        loss_difference=loss - reference,
        interval=interval_of([float((row[:, 1] - row[:, 0]).sum()) for row in rows], [len(row) for row in rows]),
        agreement=agreement,
        divergence=divergence,
        worst_divergence=float(whole[:, 3].max()),
    )


def interval_of(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """The confidence interval of a mean per token, where tokens of one sequence are not independent.

    Args:
        sums: over the tokens of each sequence.
        counts: tokens of each sequence.
    """
    number = len(sums)
    if number < 2:
        return None
    from scipy.stats import t

    mean = sum(sums) / sum(counts)
    # the spread of a ratio of sums (Cochran, Sampling Techniques, section 6.3)
    squares = sum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    error = math.sqrt(squares / (number * (number - 1))) / (sum(counts) / number)
    half = float(t.ppf((1 + CONFIDENCE) / 2, number - 1)) * error
    return mean - half, mean + half
