"""Whether a variant fits a preset, and how large a preset's model is; both without allocating a weight."""

from typing import Any

from .presets import PRESETS, preset


def fitting_model(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """The model settings of a variant, whose layers were built on no device, so that misfits show before any run.

    Args:
        name: a router, or a variant of `experiments.variants`.
        model: a preset's settings.

    Raises:
        ValueError: if there is no such variant, or it does not fit; the message says which presets it fits.
    """
    from ..variants.catalogue import expect_variant

    expect_variant(name)
    try:
        return _built(name, model)
    except ValueError as error:
        others = [other for other in PRESETS if PRESETS[other]().model != model and _fits(name, PRESETS[other]().model)]
        hint = f"; presets that it fits: {', '.join(others)}" if others else ""
        raise ValueError(f"{name}: {error}{hint}") from error


def _built(name: str, model: dict[str, Any]) -> dict[str, Any]:
    from ..variants.catalogue import model_overrides

    own = model_overrides(name, model)
    if own.get("router") == "forced":
        raise ValueError("the router 'forced' replays a recorded routing, so it cannot be trained; choose another")
    expect_buildable(own)
    return own


def expect_buildable(model: dict[str, Any]) -> None:
    """Build the layers on no device. Raises ValueError if the settings do not fit together."""
    import torch

    from moe import MoEConfig, build_body

    with torch.device("meta"):
        try:
            build_body(MoEConfig(**model))
        except (TypeError, RuntimeError) as error:  # what layers make of sizes and options that nobody thought of
            raise ValueError(f"this model cannot be built: {error}") from error


def _fits(name: str, model: dict[str, Any]) -> bool:
    try:
        _built(name, model)
    except ValueError:
        return False
    return True


def preset_sizes(name: str) -> dict[str, int]:
    """What a preset's model and run amount to, for bytes (V = 256).

    Returns:
        `parameters`, `active_parameters` (of those that a token visits: K of E experts) and `tokens` of the whole run.
    """
    config = preset(name)
    tokens = config.steps * config.accumulation * config.batch_size * config.sequence_length
    sizes = model_sizes(config.model)
    return {name: sizes[name] for name in ("parameters", "active_parameters")} | {"tokens": tokens}


def model_sizes(model: dict[str, Any]) -> dict[str, int]:
    """What a model amounts to, counted on one without weights.

    Returns:
        `parameters`, `active_parameters` (of those that a token visits: K of E experts) and `embeddings` (with the
        head, if it has weights of its own), which are part of both.
    """
    import torch

    from moe import MoEConfig, MoEForCausalLM

    with torch.device("meta"):
        built = MoEForCausalLM(MoEConfig(**model))
    total = sum(parameter.numel() for parameter in built.parameters())
    banks = [layer.experts for layer in built.model.moe_layers if hasattr(layer, "experts")]
    experts = sum(p.numel() for bank in banks for p in bank.parameters())
    visited = experts * built.config.num_experts_per_tok // built.config.num_experts
    ends = {id(p): p.numel() for end in (built.model.embed_tokens, built.lm_head) for p in end.parameters()}
    return {
        "parameters": total,
        "active_parameters": total - experts + visited,
        "embeddings": sum(ends.values()),
    }


def preset_table() -> str:
    """The presets as a Markdown table; docs/training.md holds it."""
    lines = [
        "| preset | layers x width | experts, top-k, width | parameters (active) | steps | tokens | learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PRESETS:
        config, sizes = preset(name), preset_sizes(name)
        model = config.model
        experts = f"{model['num_experts']}, {model.get('num_experts_per_tok', 2)}, {model['moe_intermediate_size']}"
        lines.append(
            f"| `{name}` | {model['num_hidden_layers']} x {model['hidden_size']} | {experts} "
            f"| {sizes['parameters'] / 1e6:.2f} M ({sizes['active_parameters'] / 1e6:.2f} M) | {config.steps:,} "
            f"| {sizes['tokens'] / 1e6:.2f} M | {config.learning_rate:g} {config.schedule} |"
        )
    return "\n".join(lines)
