"""TrainConfig: everything that a training run depends on besides its text; checked by pydantic when it is built."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic.dataclasses import dataclass


def _no_truth_value(value: object, info: ValidationInfo) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{info.field_name} must be a number; got {value}")
    return value


def _at_least(least: int) -> AfterValidator:
    def check(value: float, info: ValidationInfo) -> float:
        if value < least:
            raise ValueError(f"{info.field_name} must be at least {least}; got {value}")
        return value

    return AfterValidator(check)


NUMBER = BeforeValidator(_no_truth_value)
Count = Annotated[int, NUMBER, _at_least(1)]
Natural = Annotated[int, NUMBER, _at_least(0)]
Positive = Annotated[float, NUMBER, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, NUMBER, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, NUMBER, Field(gt=0, le=1)]
Decay = Annotated[float, NUMBER, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """One training run.

    Args:
        model: keyword arguments of `moe.MoEConfig`.
        steps: optimiser steps, 1 or more.
        batch_size: sequences per micro-batch, 1 or more.
        accumulation: micro-batches per optimiser step, 1 or more.
        sequence_length: S, tokens per sequence, at least 2: the first one is not predicted.
        optimizer: `adamw`, or `muon` (matrices by Muon, everything else by AdamW).
        learning_rate: peak of the schedule, above 0; Muon takes the same, because its updates have AdamW's size.
        min_learning_rate: last value of a schedule that falls, 0 or more.
        warmup_steps: steps of the linear rise from 0 to the peak.
        schedule: a key of `schedule.SCHEDULES`: `cosine`, `wsd` (constant, then a linear fall over the last
            `decay_share` of the steps), `linear` or `constant`.
        decay_share: share of the steps in which `wsd` falls, above 0 and at most 1.
        weight_decay: decoupled, per unit of learning rate, of matrices; norms and biases have none.
        betas: decay of AdamW's first and second moments, each in [0, 1).
        muon_momentum: decay of Muon's momentum, in [0, 1).
        clip_norm: largest global gradient norm, above 0.
        precision: `float32`, `bfloat16` (autocast), or `auto`: whichever multiplies matrices faster here.
        seed: of initialisation, data order and noise, 0 or more.
        evaluate_every, checkpoint_every: in steps, 1 or more.
        held_out_tokens: at most so many held-out tokens are scored in an evaluation.
        backend: `torch`, or `jax`, which draws other initial weights.
        mesh: devices per axis for `jax`, such as `data=2,expert=4`; None for one device.
        start_from: folder of a checkpoint whose weights the run starts with; None draws them from the seed.

    Raises:
        ValueError: if a setting is unknown, of another type, or out of range.
    """

    model: dict[str, Any] = field(default_factory=dict)
    steps: Count
    batch_size: Count
    accumulation: Count = 1
    sequence_length: Count
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-3
    min_learning_rate: NotNegative = 1e-4
    warmup_steps: Natural = 50
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    decay_share: Share = 0.2
    weight_decay: NotNegative = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    muon_momentum: Decay = 0.95
    clip_norm: Positive = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Natural = 0
    evaluate_every: Count = 100
    checkpoint_every: Count = 100
    held_out_tokens: Count = 65_536
    backend: Literal["torch", "jax"] = "torch"
    mesh: str | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError("sequence_length must be at least 2, a token and the one that it predicts; got 1")
        if self.mesh is not None and self.backend != "jax":
            raise ValueError("mesh is for the backend jax; several processes of torch are started by --processes")
