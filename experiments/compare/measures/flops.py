"""Parameters and floating-point operations of a forward pass per token, added up in this one place.

A multiply and an add are two operations. Norms, rotary angles, softmaxes and activations are left out. What stands in a
decoder layer's feed-forward place says its own operations (`RoutedLayer.flops`), and so does a router (`Router.flops`).
A stack says how often tokens pass its layers (`StackOutput.passes`); the rest is counted here.

Shapes: R routable experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe import LayerFlops, LayerPasses, MoEForCausalLM, MoEOutput, RoutedLayer, projection_flops


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Operations per token of one forward pass.

    Args:
        attention: projections, and scores and values over the mean number of visible positions.
        experts: FFN experts that a token visits on average.
        shared: shared experts and dense layers, which every token visits.
        zero_compute: copy and constant experts.
        router: scores, recurrent cells, projections, gating residuals, depth routers.
        head: the language-model head, once per token.
    """

    attention: float
    experts: float
    shared: float
    zero_compute: float
    router: float
    head: float

    @property
    def total(self) -> float:
        return self.attention + self.experts + self.shared + self.zero_compute + self.router + self.head


@dataclass(frozen=True, kw_only=True, eq=False)
class Usage:
    """What tokens used on average, per token of the text.

    Args:
        loads: per router, [R] slots that were computed, summed over the router's calls.
        router_passes: per router, how often it was asked.
        layer_passes: per decoder layer, how often it was passed; None for once.
    """

    loads: Sequence[Tensor]
    router_passes: Sequence[float]
    layer_passes: Sequence[LayerPasses] | None = None


def measured_usage(outputs: Sequence[MoEOutput], num_tokens: int) -> Usage:
    """The usage in some forward passes over `num_tokens` tokens in all, padding not counted."""
    calls = list(zip(*(output.router_stats or [] for output in outputs), strict=True))
    passes = None
    if outputs[0].passes is not None:
        per_layer = zip(*(output.passes for output in outputs), strict=True)
        passes = [_mean_passes(layer) for layer in per_layer]
    return Usage(
        loads=[sum(call.kept_R for call in router) / num_tokens for router in calls],
        router_passes=[sum(call.num_tokens for call in router) / num_tokens for router in calls],
        layer_passes=passes,
    )


def token_flops(model: MoEForCausalLM, usage: Usage, *, sequence_length: int) -> TokenFlops:
    """Operations per token, with the loads that were measured.

    Args:
        model: says its sizes and what its parts cost.
        usage: what tokens used, after capacity drops.
        sequence_length: S; a token sees (S + 1) / 2 positions on average.
    """
    config = model.config
    D, A = config.hidden_size, config.head_dim
    query_width, key_width = config.num_attention_heads * A, config.num_key_value_heads * A
    visible = (sequence_length + 1) / 2
    passes = usage.layer_passes or [LayerPasses()] * len(model.model.layers)
    attention = sum(
        2 * D * (2 * query_width * layer.tokens + 2 * key_width * layer.keys)
        + 2 * 2 * query_width * visible * layer.visible
        for layer in passes
    )
    layers = _layer_flops(model, usage, passes)
    return TokenFlops(
        attention=attention + sum(layer.attention for layer in layers),
        experts=sum(layer.experts for layer in layers),
        shared=sum(layer.shared for layer in layers),
        zero_compute=sum(layer.zero_compute for layer in layers),
        router=router_flops(model, usage.router_passes) + model.model.stack.flops,
        head=2 * D * config.vocab_size,
    )


def router_flops(model: MoEForCausalLM, passes: Sequence[float] | None = None) -> float:
    """What routers say that a call costs (`Router.flops`), each as often as a token passes it.

    Args:
        model: its routers are asked.
        passes: per router, how often a token passes it; once each if not given.
    """
    routers = model.model.routers
    passes = [1.0] * len(routers) if passes is None else passes
    return sum((router.flops() * times for router, times in zip(routers, passes, strict=True)), 0.0)


def parameters(model: MoEForCausalLM, true_load: float) -> dict[str, int]:
    """`total`, `router`, and `active`: all but the experts that a token does not visit.

    `true_load` counts a token's experts per layer; where iterations of a chain may name one twice, `active` is the most
    that it can be.
    """
    total = sum(p.numel() for p in model.parameters())
    banks = [layer.experts for layer in model.model.moe_layers if hasattr(layer, "experts")]
    router = sum(p.numel() for router in model.model.routers for p in router.parameters())
    active = total
    for bank in banks:
        # a table of product keys says its own rows, and how many layers read it
        share = true_load * getattr(bank, "readers", 1) / getattr(bank, "num_rows", model.config.num_experts)
        active -= sum(p.numel() for p in bank.parameters()) * (1 - min(1.0, share))
    return {"total": total, "router": router, "active": round(active)}


def _layer_flops(model: MoEForCausalLM, usage: Usage, passes: Sequence[LayerPasses]) -> list[LayerFlops]:
    """Per decoder layer; a dense one costs its matrices for each pass."""
    loads, found = list(usage.loads), []
    for layer, own in zip(model.model.layers, passes, strict=True):
        if isinstance(layer.mlp, RoutedLayer):
            num_routers = len(layer.mlp.routers)
            found.append(layer.mlp.flops(loads[:num_routers], own.tokens))
            del loads[:num_routers]
        else:
            found.append(LayerFlops(shared=projection_flops(layer.mlp) * own.tokens))
    return found


def _mean_passes(layer: Sequence[LayerPasses]) -> LayerPasses:
    """Over calls of equally many tokens."""
    return LayerPasses(
        tokens=sum(call.tokens for call in layer) / len(layer),
        keys=sum(call.keys for call in layer) / len(layer),
        visible=sum(call.visible for call in layer) / len(layer),
    )
