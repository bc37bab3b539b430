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
    import torch

    from moe import MoEConfig, build_body

    from ..variants.catalogue import model_overrides

    own = model_overrides(name, model)
    if own.get("router") == "forced":
        raise ValueError("the router 'forced' replays a recorded routing, so it cannot be trained; choose another")
    with torch.device("meta"):
        build_body(MoEConfig(**own))
    return own


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
    import torch

    from moe import MoEConfig, MoEForCausalLM

    config = preset(name)
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig(**config.model))
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for layer in model.model.moe_layers for p in layer.experts.parameters())
    visited = experts * model.config.num_experts_per_tok // model.config.num_experts
    tokens = config.steps * config.accumulation * config.batch_size * config.sequence_length
    return {"parameters": total, "active_parameters": total - experts + visited, "tokens": tokens}


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
