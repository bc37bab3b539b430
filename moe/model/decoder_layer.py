"""DecoderLayer: attention, then what stands in the feed-forward place.

Shapes: B batch, S positions, T = B * S tokens, D model width.
"""

from torch import Tensor, nn

from routing import Carry, RouterStats

from ..layers.layer import FeedForward
from ..layers.stack import StackInputs
from ..parts.attention import Attention
from ..parts.config import MoEConfig
from ..parts.norm import RMSNorm


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward; `mlp` is a `RoutedLayer`, or a `FeedForward` in dense layers."""

    def __init__(self, config: MoEConfig, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry, list[RouterStats]]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), inputs.angles, inputs.mask, inputs.cache)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, FeedForward):
            return x_BSD + self.mlp(normed_BSD), carry, []
        y_TD, carry, stats = self.mlp(normed_BSD.flatten(0, 1), carry, inputs.context)
        y_BSD = y_TD.view_as(x_BSD)
        return x_BSD + y_BSD if self.mlp.adds_to_stream else y_BSD, carry, stats
