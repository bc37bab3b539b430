"""MoDE: experts chosen by a condition (noise level, task), which can be fused into one network per condition.

Source: Reuss et al. 2024, arXiv:2412.12953, section 3; `moe.fused_experts` is the cache, `moe.Denoiser` the policy.

Shapes: B batch, S positions, T = B * S tokens, D model width.
"""

from functools import partial

from torch import Tensor, nn

from routing import Carry, ConditionRouter, RouterStats

from ...layers.layer import build_moe_layer
from ...layers.stack import StackInputs
from ...parts.attention import Attention
from ...parts.config import MoEConfig
from ...parts.norm import RMSNorm
from ..body import Body
from .rescored import rescored_routers


def mode(
    config: MoEConfig,
    *,
    reads: str = "condition",
    inner_width: int | None = None,
    samples: bool = True,
    attends: bool = False,
) -> Body:
    """Mixture-of-experts layers whose routers read the call's condition; see `routing.ConditionRouter`.

    Args:
        reads, inner_width, samples: of the routers.
        attends: whether attention reads token plus condition in every layer (the paper's noise-conditioned attention).

    Raises:
        ValueError: if attention is conditioned and there are dense layers, which have no condition.
    """
    if attends and config.num_dense_layers:
        raise ValueError(f"with attends=true num_dense_layers must be 0; got {config.num_dense_layers}")
    kind = partial(ConditionRouter, reads=reads, inner_width=inner_width, samples=samples)  # type: ignore[arg-type]
    layers = [build_moe_layer(config, router) for router in rescored_routers(config, kind)]
    return Body(layers=layers, decoder_layer=ConditionedDecoderLayer if attends else None)


class ConditionedDecoderLayer(nn.Module):
    """Pre-norm attention over tokens to which the condition is added, then routed experts.

    Args:
        layer_idx: its place in the decoder.
        mlp: the routed layer.
    """

    def __init__(self, config: MoEConfig, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry, list[RouterStats]]:
        condition_TD, read_BSD = inputs.context.condition_TD, self.input_layernorm(x_BSD)
        if condition_TD is not None:
            read_BSD = read_BSD + condition_TD.view_as(x_BSD).to(x_BSD.dtype)
        x_BSD = x_BSD + self.self_attn(read_BSD, inputs.angles, inputs.mask, inputs.cache)
        y_TD, carry, stats = self.mlp(self.post_attention_layernorm(x_BSD).flatten(0, 1), carry, inputs.context)
        return x_BSD + y_TD.view_as(x_BSD), carry, stats
