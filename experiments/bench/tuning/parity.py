"""What has to hold before a step is timed: losses and steps of each method are those of the model in memory."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routing.traces import RoutingTrace

from ...evidence.replay import ReplaySize, build_replay
from .work import Work

TOKENS, EXPERTS = 96, 16
"""Four rows of tokens; enough experts that a step leaves some untouched."""
MOST = 1e-4
"""Relative difference of a first loss: bfloat16 has 8 bits, and zo measures beside the weights. Found: 2e-5."""


def check_parity(methods: Sequence[str]) -> None:
    """Try methods on a small replay checkpoint, with few slots and with all.

    Raises:
        RuntimeError: if the first loss is not that of transformers' model, or slots change anything.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        rng = np.random.default_rng(0)
        chosen = [[rng.permutation(EXPERTS)[:4] for _ in range(2)] for _ in range(TOKENS)]
        trace = RoutingTrace(
            expert_TLK=np.array(chosen, np.int16),
            sequence_T=np.zeros(TOKENS, np.int32),
            metadata={"num_experts": EXPERTS},
        )
        work = Work(checkpoint=f"{temporary}/model", scratch=temporary, steps=2, sequence_length=24, accumulation=2)
        build_replay(trace, Path(work.checkpoint), ReplaySize(hidden=64, expert=64))
        expected = _resident_loss(work)
        for method in methods:
            few, many = (_losses(method, work, slots) for slots in (2, EXPERTS))
            if few != many:
                raise RuntimeError(f"{method}: losses {few} with 2 slots, {many} with all; nothing is measured")
            if abs(few[0] - expected) > MOST * expected:
                raise RuntimeError(f"{method}: loss {few[0]}, the resident model has {expected}; nothing is measured")


def _losses(method: str, work: Work, slots: int) -> list[float]:
    """Two steps' losses; the second one is after an update."""
    from .contestants import ours

    return [row["loss"] for row in ours(method, work, slots)["steps"]]


def _resident_loss(work: Work) -> float:
    """The first step's loss by transformers alone."""
    import torch

    from ...evidence.resident import load_resident
    from .contestants import trace_rows

    model = load_resident(Path(work.checkpoint))
    batches = trace_rows(work.checkpoint, work.sequence_length).batches(0, work.options("lora"))
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in batches]
    return sum(losses) / len(losses)
