"""Presets: descriptions of runs that other descriptions start from."""

from dataclasses import replace

from routing.ground.expect import expect_name

from .description.config import TrainConfig


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


def small() -> TrainConfig:
    """32 experts, top-2, four layers: what a run file changes first; some minutes on two cores."""
    return TrainConfig(
        model={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 32,
            "moe_intermediate_size": 96,
        },
        steps=1_000,
        batch_size=8,
        sequence_length=128,
        learning_rate=3e-3,
        warmup_steps=50,
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


PRESETS = {
    "smoke": smoke,
    "demo": demo,
    "routers": routers,
    "chains": chains,
    "small": small,
    "e16": e16,
    "e64": e64,
}


def preset(name: str) -> TrainConfig:
    """The preset of that name.

    Raises:
        ValueError: if there is none.
    """
    return PRESETS[expect_name(name, PRESETS, "preset")]()


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """The run with another number of steps; its warm-up is cut to fit, so that the learning rate reaches its peak."""
    return replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps))


def with_rate(config: TrainConfig, rate: float) -> TrainConfig:
    """The run with another peak rate; the last rate keeps its share of it."""
    return replace(config, learning_rate=rate, min_learning_rate=rate * config.min_learning_rate / config.learning_rate)
