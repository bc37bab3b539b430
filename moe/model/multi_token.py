"""Multi-token prediction: in training, small blocks behind the model predict tokens further ahead.

Shapes: B batch, S positions, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.masking_utils import create_causal_mask

from routing import Carry, RoutingContext

from ..layers.layer import FeedForward
from ..layers.stack import StackInputs
from ..parts.attention import rotary_angles
from ..parts.config import MoEConfig
from ..parts.linear import Linear
from ..parts.norm import RMSNorm
from .decoder_layer import DecoderLayer


class AheadBlock(nn.Module):
    """One depth: joins the state so far with the embedding of the next token, and runs a dense decoder layer."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.state_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.token_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.joint = Linear(2 * config.hidden_size, config.hidden_size)
        feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.layer = DecoderLayer(config, 0, feed_forward)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, state_BSD: Tensor, token_BSD: Tensor, inputs: StackInputs) -> Tensor:
        joined = torch.cat([self.state_norm(state_BSD), self.token_norm(token_BSD)], dim=-1)
        return self.layer(self.joint(joined), Carry(), inputs)[0]


class MultiTokenHead(nn.Module):
    """Depth k predicts token t + k + 1 from the states of tokens up to t and the tokens up to t + k.

    The embedding and the language-model head are the model's own. Nothing of it runs outside training, so generation
    and exports do without it. Published blocks have experts; ours are dense, so that routers' statistics stay as they
    are.

    Args:
        config: `mtp_depth` blocks of the model's sizes.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 2.2.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(AheadBlock(config) for _ in range(config.mtp_depth))

    def forward(
        self,
        state_BSD: Tensor,
        token_BSD: Tensor,
        labels_BS: Tensor,
        attention_mask: Tensor | None,
        head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Mean cross entropy over depths, in nats; 0 for texts too short to look ahead.

        Args:
            state_BSD: final states of the model.
            token_BSD: embeddings of its input tokens.
            labels_BS: the same tokens as ids; -100 is ignored.
            attention_mask: [B, S], 0 for padding; None for none.
            head: from states to logits.
        """
        losses = []
        for depth, block in enumerate(self.blocks, start=1):
            length = labels_BS.shape[1] - depth
            if length < 2:
                break
            mask = None if attention_mask is None else attention_mask[:, :length]
            inputs = self._inputs(state_BSD[:, :length], mask)
            state_BSD = block(state_BSD[:, :length], token_BSD[:, depth:], inputs)
            logits = head(block.norm(state_BSD[:, :-1]))
            losses.append(cross_entropy(logits.flatten(0, 1).float(), labels_BS[:, depth + 1 :].flatten()))
        return torch.stack(losses).mean() if losses else state_BSD.new_zeros(())

    def _inputs(self, x_BSD: Tensor, attention_mask: Tensor | None) -> StackInputs:
        config = self.config
        position_ids = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=x_BSD,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        angles = rotary_angles(position_ids, config.head_dim, config.rope_theta)
        return StackInputs(angles=angles, mask=mask, cache=None, context=RoutingContext())
