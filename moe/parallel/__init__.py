"""Experts on several processes: how a model is split, how tokens reach their experts, and what that moves.

Everything here stands on `torch.distributed`, FSDP2 and the expert parallelism of transformers; a process group is the
caller's to start.
"""

from ..inference.logit_offsets import experts_modules
from .copies import Copies
from .dealt import DealtExperts, ExpertFailure, LostProcess, Questions, answer_questions
from .degrees import Degree, degrees
from .dispatch import DISPATCHES, dispatch
from .floors import StepFloor, step_floor
from .gradients import average_gradients, clip_gradients
from .layout import BY_TIME, Layout
from .moving import Move, MovingLayer
from .placed import PlacedExperts, place_experts
from .shard import Split, expect_splittable, split
from .slicing import SlicedExperts, slice_of
from .staying import Crossing, Here, go_on
from .traffic import Traffic
from .woven import STEPS, Steps, Wire, in_steps, stagger, weave

__all__ = [
    "BY_TIME",
    "DISPATCHES",
    "STEPS",
    "Copies",
    "Crossing",
    "DealtExperts",
    "Degree",
    "ExpertFailure",
    "Here",
    "Layout",
    "LostProcess",
    "Move",
    "MovingLayer",
    "PlacedExperts",
    "Questions",
    "SlicedExperts",
    "Split",
    "StepFloor",
    "Steps",
    "Traffic",
    "Wire",
    "answer_questions",
    "average_gradients",
    "clip_gradients",
    "degrees",
    "dispatch",
    "expect_splittable",
    "experts_modules",
    "go_on",
    "in_steps",
    "place_experts",
    "slice_of",
    "split",
    "stagger",
    "step_floor",
    "weave",
]
