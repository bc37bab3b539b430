"""Replay checkpoints: random weights whose routing reproduces a recorded trace, plain or in a stored form."""

from .build import build_replay, check_replay
from .size import FORMS, ReplaySize, form_of, replay_bytes, usual_size

__all__ = ["FORMS", "ReplaySize", "build_replay", "check_replay", "form_of", "replay_bytes", "usual_size"]
