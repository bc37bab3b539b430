"""Runs a model over sequences for the routing that it records; the trace is on disk while it grows."""

import inspect
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

TRACE_EVERY_S = 5.0
"""Most seconds of routing that a power cut costs. Each save rewrites the whole trace, which took 1.7 s for 10,000
tokens of 16 layers with K = 8 on two slow cores."""
LOGITS_OPTIONS = ("logits_to_keep", "num_logits_to_keep")


def record_over(model: Any, sequences: Iterable[list[int]], out: Path, progress: Callable[[int], None]) -> int:
    """Run a model over sequences and save its routing, every few seconds, at the end and after Ctrl-C.

    Args:
        model: a model from `load` with `record_trace=True`.
        sequences: token ids; each is a sequence of its own.
        out: the trace (.npz).
        progress: told the tokens of each sequence that is done.

    Returns:
        Tokens recorded.

    Raises:
        ValueError: if there are none.
    """
    done, saved_s = 0, time.perf_counter()
    options = only_last_logits(model)
    try:
        with torch.no_grad():
            for sequence in sequences:
                model(torch.tensor([sequence], device=model.device), use_cache=False, **options)
                done += len(sequence)
                progress(len(sequence))
                if time.perf_counter() - saved_s > TRACE_EVERY_S:
                    model.offload.save_trace(out)
                    saved_s = time.perf_counter()
    finally:
        if done:
            model.offload.save_trace(out)
    if not done:
        raise ValueError("the data holds no text")
    return done


def only_last_logits(model: Any) -> dict[str, int]:
    """The option of `forward` by which a model computes logits of the last token only; empty if it has none.

    Logits of all positions are the largest activation of a long sequence, and routing does not need them.
    """
    known = inspect.signature(model.forward).parameters
    return next(({name: 1} for name in LOGITS_OPTIONS if name in known), {})
