"""What every contestant of `expertier bench finetune` does; without torch."""

from dataclasses import dataclass

from offload import TuneOptions, parse_size

RATE = 1e-6
"""Learning rate of all: steps are timed, nothing is to be learnt."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Steps of fine-tuning.

    Args:
        checkpoint: folder of a replay checkpoint.
        scratch: an empty folder on the same disk.
        limit: memory, such as `6GiB`, or `none`.
        steps: optimiser steps.
        sequence_length, batch_size, accumulation: rows of a step.
        rank: of adapters.
        activation_memory: what `lora` and `full` may keep between two experts modules, such as `512MiB`.
    """

    checkpoint: str
    scratch: str = ""
    limit: str = "none"
    steps: int
    sequence_length: int
    batch_size: int = 1
    accumulation: int
    rank: int = 2
    activation_memory: str = "512MiB"

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.sequence_length * self.batch_size * self.accumulation

    def options(self, method: str) -> TuneOptions:
        """The settings of ours; one more step than is done, so that no model is written at the end."""
        return TuneOptions(
            method=method,
            steps=self.steps + 1,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            rank=self.rank,
            activation_bytes=None if method == "zo" else parse_size(self.activation_memory),
            learning_rate=RATE,
            checkpoint_every=self.steps + 1,
        )
