"""The decoder language model, as an ordinary transformers model: generate, save_pretrained, from_pretrained.

Shapes: B batch, S positions, T = B * S tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
)
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from routing import Carry, RouterStats, RoutingContext, auxiliary_loss, scheduled_weight

from ..architectures import build_body
from ..layers.layer import FeedForward, RoutedLayer
from ..layers.stack import LayerPasses, StackInputs, StackOutput
from ..parts.attention import rotary_angles
from ..parts.config import MoEConfig
from ..parts.linear import Linear
from ..parts.norm import RMSNorm
from ..parts.signals import signal_fields
from .decoder_layer import DecoderLayer
from .multi_token import MultiTokenHead
from .outside_step import expect_known_outputs, outside_steps
from .pretrained import MoEPreTrainedModel


@dataclass
class MoEOutput(ModelOutput):
    """Result of a forward pass.

    Args:
        loss: language-model loss plus weighted auxiliary losses, when labels are given.
        logits: [B, S, V].
        past_key_values: the key/value cache, for the next call of this sequence.
        lm_loss: mean cross entropy per predicted token in nats, when labels are given.
        router_stats: one `RouterStats` per call of a router: one per MoE layer, unless the architecture says otherwise.
        losses: further training losses of the architecture, already weighted and part of `loss`.
        passes: per decoder layer, how often tokens passed it; None when all passed all layers once.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    lm_loss: Tensor | None = None
    router_stats: list[RouterStats] | None = None
    losses: dict[str, Tensor] | None = None
    passes: list[LayerPasses] | None = None


class MoEModel(MoEPreTrainedModel):
    """Embedding, decoder layers and the final norm."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        body = build_body(config)
        dense = [
            FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
            for _ in range(config.num_dense_layers)
        ]
        make_layer = body.decoder_layer or DecoderLayer
        self.layers = nn.ModuleList(make_layer(config, i, mlp) for i, mlp in enumerate([*dense, *body.layers]))
        self.stack = body.stack
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.optimizer_step = 0
        self.top_k: int | None = None
        self.post_init()

    @property
    def moe_layers(self) -> list[RoutedLayer]:
        """The L routed layers, first to last."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, RoutedLayer)]

    @property
    def routers(self) -> list[nn.Module]:
        """Every router, in the order of the statistics."""
        return [router for layer in self.moe_layers for router in layer.routers]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        condition: Tensor | None = None,
        modality: Tensor | None = None,
        logit_bias_LR: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[StackOutput, Cache | None]:
        """Final hidden states [B, S, D] with the routers' statistics, and the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(x_BSD, attention_mask, past_key_values)
        context = self._routing_context(x_BSD, input_ids, attention_mask, position_ids, past_key_values)
        signals = signal_fields(*x_BSD.shape, condition, modality, logit_bias_LR)
        inputs = self._stack_inputs(x_BSD, attention_mask, position_ids, past_key_values, replace(context, **signals))
        for layer in self.moe_layers:
            layer.expect(inputs.context)
        carry = self.routers[0].begin(inputs.context) if self.routers else Carry()
        output = self.stack(self.layers, x_BSD, carry, inputs)
        return replace(output, x_BSD=self.norm(output.x_BSD)), past_key_values

    def _stack_inputs(
        self,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        context: RoutingContext,
    ) -> StackInputs:
        """What all decoder layers of this pass see; routers are told the mask as well."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        return StackInputs(
            angles=rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta),
            mask=mask,
            cache=cache,
            context=replace(context, attention_mask=mask),
        )

    def post_step(self, counts: Sequence[Tensor], num_tokens: int) -> None:
        """Tell every router that an optimiser step is done.

        Args:
            counts: per router, how many tokens chose each routable expert [R], summed over the step's micro-batches.
            num_tokens: the valid tokens of the step.
        """
        self.optimizer_step += 1
        for router, count_R in zip(self.routers, counts, strict=True):
            router.post_step(count_R, num_tokens)
        self.stack.post_step()

    def _routing_context(
        self,
        x_BSD: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
    ) -> RoutingContext:
        B, S, _ = x_BSD.shape
        is_valid_T = None
        if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.all():
            is_valid_T = attention_mask[:, -S:].bool().flatten()
        return RoutingContext(
            is_training=self.training,
            step=self.optimizer_step,
            token_id_T=None if input_ids is None else input_ids.flatten(),
            position_T=position_ids.expand(B, S).flatten(),
            sequence_T=torch.arange(B, device=x_BSD.device).repeat_interleave(S),
            is_valid_T=is_valid_T,
            top_k=self.top_k,
            cache=cache,
        )


def _positions(x_BSD: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """int64 [B or 1, S]: how many tokens stand before each one in its sequence, padding not counted."""
    S = x_BSD.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp_min(0)[:, -S:]
    num_seen = cache.get_seq_length() if cache is not None else 0
    return torch.arange(num_seen, num_seen + S, device=x_BSD.device)[None]


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head.

    Args:
        config: sizes, router and losses.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads it so)
    accepts_loss_kwargs = True  # tells transformers' Trainer that the loss is divided by `num_items_in_batch` here

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.model = MoEModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = MultiTokenHead(config) if config.mtp_depth else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        condition: Tensor | None = None,
        modality: Tensor | None = None,
        logit_bias_LR: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MoEOutput:
        """Logits, and the loss when `labels` are given.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S], the same tokens as `input_ids` (the shift happens here); -100 is ignored.
            logits_to_keep: compute only the last so many positions; 0 means all.
            condition: float [B, D], what routers of the architecture `mode` read: a noise level, a task.
            modality: int64 [B, S], or [B, 1] for one modality per sequence; by default it follows from the token id.
            logit_bias_LR: added to every router's logits in this request, as `routing.task_bias` makes it.
            num_items_in_batch: tokens that all micro-batches of an optimiser step predict together, as transformers'
                `Trainer` counts them. The loss is then this micro-batch's share of the step's mean, and in training the
                routers are told of the optimiser's steps by themselves.
            **kwargs: `attention_mask`, `position_ids`, `past_key_values`, `inputs_embeds`, `use_cache`.

        Raises:
            ValueError: if an output is asked for that this model does not have, or a `Trainer` computes the loss.
        """
        expect_known_outputs(kwargs)
        output, cache = self.model(
            input_ids, condition=condition, modality=modality, logit_bias_LR=logit_bias_LR, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.x_BSD[:, kept])
        loss = lm_loss = None
        if labels is not None:
            lm_loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            loss = lm_loss
            if self.training:
                loss = lm_loss + self._auxiliary_loss(output)
                if self.mtp is not None and input_ids is not None:
                    tokens = self.model.embed_tokens(input_ids)
                    ahead = self.mtp(output.x_BSD, tokens, labels, kwargs.get("attention_mask"), self.lm_head)
                    loss = loss + self.config.mtp_loss_weight * ahead
        if num_items_in_batch is not None:
            loss = self._share_of_step(loss, labels, num_items_in_batch)
            self._note_outside_step(output.router_stats, input_ids, kwargs)
        return MoEOutput(
            loss=loss,
            lm_loss=lm_loss,
            logits=logits,
            past_key_values=cache,
            router_stats=output.router_stats,
            losses=output.losses or None,
            passes=output.passes,
        )

    def _share_of_step(self, loss: Tensor | None, labels: Tensor | None, num_items: Tensor | int) -> Tensor | None:
        """A micro-batch's mean loss, weighted by its share of the tokens that its optimiser step predicts."""
        if labels is None:
            if self.training:
                raise ValueError(
                    "the loss would be computed outside of the model (label smoothing, or a compute_loss_func), which "
                    "leaves out the balance losses of the routers; turn that off"
                )
            return loss
        own = (labels[:, 1:] != -100).sum()
        return loss.nan_to_num() * (own / num_items) if own == 0 else loss * (own / num_items)

    def _note_outside_step(
        self, stats: Sequence[RouterStats], input_ids: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        if not self.training:
            return
        mask = kwargs.get("attention_mask")
        tokens = kwargs["inputs_embeds"][..., 0] if input_ids is None else input_ids
        is_plain = mask is None or mask.ndim != 2
        outside_steps(self.model).note(stats, tokens.numel() if is_plain else int(mask.sum()))

    def _auxiliary_loss(self, output: StackOutput) -> Tensor:
        loss = sum(output.losses.values(), start=output.x_BSD.new_zeros(()))
        if not output.router_stats:
            return loss
        return loss + auxiliary_loss(
            output.router_stats,
            balance_weight=self._balance_weight(),
            z_weight=self.config.z_loss_weight,
            reuse_loss=self.config.reuse_loss,
            reuse_weight=self.config.reuse_loss_weight,
        )

    def _balance_weight(self) -> float:
        config = self.config
        return scheduled_weight(config.balance_loss_weight, config.balance_loss_schedule, self.model.optimizer_step)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises ValueError if routing looks at later tokens, which do not exist yet."""
        model, config = self.model, self.config
        if not (model.stack.is_causal and all(router.is_causal for router in model.routers)):
            raise ValueError(
                f"the router {config.router!r} in the architecture {config.architecture!r} is not causal: a token's "
                "experts depend on later tokens, so this model cannot generate; train another, or use it for scoring "
                "whole sequences only"
            )
        return super().generate(*args, **kwargs)


AutoConfig.register(MoEConfig.model_type, MoEConfig)
AutoModel.register(MoEConfig, MoEModel)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM)
