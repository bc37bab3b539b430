"""TrainConfig and its presets: everything a training run depends on besides the text and the router."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from routing.ground.expect import expect_name


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        model: keyword arguments of `moe.MoEConfig`.
        steps: optimiser steps.
        batch_size: sequences per micro-batch.
        accumulation: micro-batches per optimiser step.
        sequence_length: S, tokens per sequence, at least 2: the first one is not predicted.
        learning_rate: peak of the schedule.
        min_learning_rate: its last value.
        warmup_steps: steps of the linear rise from 0 to the peak.
        schedule: `cosine`, or `wsd` (constant, then a linear fall over the last `decay_share` of the steps).
        decay_share: share of the steps in which `wsd` falls.
        weight_decay: of matrices; norms and biases have none.
        betas: of AdamW.
        clip_norm: largest global gradient norm.
        precision: `float32`, `bfloat16` (autocast), or `auto`: whichever multiplies matrices faster here.
        seed: of initialisation, data order and noise.
        evaluate_every, checkpoint_every: in steps.
        held_out_tokens: at most so many held-out tokens are scored in an evaluation.

    Raises:
        ValueError: if a number is out of range.
    """

    model: dict[str, Any] = field(default_factory=dict)
    steps: int
    batch_size: int
    accumulation: int = 1
    sequence_length: int
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 50
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    evaluate_every: int = 100
    checkpoint_every: int = 100
    held_out_tokens: int = 65_536

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulation", "sequence_length", "evaluate_every", "checkpoint_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ValueError("sequence_length must be at least 2, a token and the one that it predicts; got 1")
        for name, choices in (("schedule", ("cosine", "wsd")), ("precision", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")


def smoke() -> TrainConfig:
    """Seconds on two cores; for tests and first steps."""
    return TrainConfig(
        model={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "num_experts": 8,
            "moe_intermediate_size": 64,
        },
        steps=40,
        batch_size=8,
        sequence_length=64,
        learning_rate=3e-3,
        warmup_steps=5,
        evaluate_every=20,
        checkpoint_every=20,
        held_out_tokens=8_192,
    )


def demo() -> TrainConfig:
    """The model of `expertier demo`: 8 layers, 16 experts, top-2, a few minutes on two cores."""
    return TrainConfig(
        model={
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "num_experts": 16,
            "moe_intermediate_size": 192,
            "qk_norm": "full",
        },
        steps=500,
        batch_size=8,
        sequence_length=256,
        learning_rate=3e-3,
        warmup_steps=40,
        evaluate_every=100,
        checkpoint_every=100,
    )


def routers() -> TrainConfig:
    """For comparing routers on two cores: the demo's depth and experts, narrow, about a minute and a half a run."""
    return TrainConfig(
        model={
            "hidden_size": 96,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "num_experts": 16,
            "moe_intermediate_size": 96,
        },
        steps=300,
        batch_size=8,
        sequence_length=128,
        learning_rate=3e-3,
        warmup_steps=30,
        precision="float32",
        evaluate_every=100,
        checkpoint_every=50,
        held_out_tokens=32_768,
    )


def chains() -> TrainConfig:
    """For comparing architectures on one slow core: 4 layers of 32 fine-grained experts, top-8, one shared."""
    return TrainConfig(
        model={
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 32,
            "num_shared_experts": 1,
            "balance_loss_weight": 0.001,
        },
        steps=400,
        batch_size=8,
        sequence_length=128,
        learning_rate=3e-3,
        warmup_steps=40,
        precision="float32",
        evaluate_every=100,
        checkpoint_every=100,
        held_out_tokens=32_768,
    )


def e16() -> TrainConfig:
    """16 experts, top-2, 8 layers, wider than the demo: half an hour on two cores."""
    return TrainConfig(
        model={"hidden_size": 256, "num_hidden_layers": 8, "num_experts": 16, "moe_intermediate_size": 256},
        steps=2_000,
        batch_size=16,
        sequence_length=256,
        warmup_steps=100,
    )


def e64() -> TrainConfig:
    """64 fine-grained experts, top-8, 12 layers: for one GPU."""
    return TrainConfig(
        model={
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 256,
        },
        steps=10_000,
        batch_size=32,
        sequence_length=512,
        learning_rate=6e-4,
        min_learning_rate=6e-5,
        warmup_steps=500,
        schedule="wsd",
    )


PRESETS = {"smoke": smoke, "demo": demo, "routers": routers, "chains": chains, "e16": e16, "e64": e64}


def preset(name: str) -> TrainConfig:
    """The preset of that name.

    Raises:
        ValueError: if there is none.
    """
    return PRESETS[expect_name(name, PRESETS, "preset")]()


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """The run with another number of steps; its warm-up is cut to fit, so that the learning rate reaches its peak."""
    return replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps))
