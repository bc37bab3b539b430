"""What one token costs: parameters and floating-point operations of a forward pass, the one place that counts them.

A multiply and an add are two operations. Norms, rotary angles, softmaxes and activations are left out.
"""

from dataclasses import dataclass

from moe import MoEConfig, MoEForCausalLM


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Operations per token of one forward pass.

    Args:
        attention: projections, and scores and values over the mean number of visible positions.
        experts: FFN experts that a token visits on average.
        shared: shared experts and dense layers, which every token visits.
        zero_compute: copy and constant experts.
        router: scores, recurrent cells, projections, gating residuals.
        head: the language-model head.
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


def token_flops(
    model: MoEForCausalLM, *, true_load: float, zero_compute_load: dict[str, float], sequence_length: int
) -> TokenFlops:
    """Operations per token, with the loads that were measured.

    Args:
        model: gives sizes, and the router's parameters.
        true_load: FFN experts per token and MoE layer, after drops.
        zero_compute_load: zero-compute experts per token and MoE layer, by kind.
        sequence_length: S; a token sees (S + 1) / 2 positions on average.
    """
    config: MoEConfig = model.config
    D, F, layers, moe_layers = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_hidden_layers,
        config.num_moe_layers,
    )
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    projections = 2 * D * (2 * query_width + 2 * key_width)
    visible = (sequence_length + 1) / 2
    constant = 2 * 2 * D + 4 * D  # the two mixing scores, then a1 x + a2 v added with its weight
    return TokenFlops(
        attention=layers * (projections + 2 * 2 * query_width * visible),
        experts=moe_layers * true_load * 6 * D * F,
        shared=moe_layers * config.num_shared_experts * 6 * D * F
        + config.num_dense_layers * 6 * D * config.intermediate_size,
        zero_compute=moe_layers
        * (zero_compute_load.get("copy", 0.0) * 2 * D + zero_compute_load.get("constant", 0.0) * constant),
        router=router_flops(model),
        head=2 * D * config.vocab_size,
    )


def router_flops(model: MoEForCausalLM) -> float:
    """Two per entry of every router matrix for each time a token passes it: a shared cell is passed in every layer."""
    total = 0.0
    for layer in model.model.moe_layers:
        for name, parameter in layer.router.named_parameters():
            if parameter.ndim == 2:
                passes = model.config.num_moe_layers if ".cell." in f".{name}" else 1
                total += 2 * parameter.numel() * passes
    return total


def parameters(model: MoEForCausalLM, true_load: float) -> dict[str, int]:
    """`total`, `router`, and `active`: all but the experts that a token does not visit."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.model.moe_layers for p in layer.experts.parameters())
    router = sum(p.numel() for layer in model.model.moe_layers for p in layer.router.parameters())
    active = total - experts * (1 - true_load / model.config.num_experts)
    return {"total": total, "router": router, "active": round(active)}
