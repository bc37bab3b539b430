"""Whole models as experts: token probabilities are mixed, uniformly or by which member has predicted the text so far.

p(x_t | x_<t) = sum_m w_m(x_<t) p_m(x_t | x_<t), w uniform, or w_m ~ prior_m prod_{s<t} p_m(x_s | x_<s), normalised.
Probabilities are averaged, never their logarithms: the published uniform path averages log-softmax values, which gives
an unnormalised geometric mean.

Source: HDEE 2025, arXiv:2502.19385; McAllister et al. 2025 (Decentralized Diffusion Models), arXiv:2501.05450, for the
mixture over the K likeliest members.

Shapes: B batch, S positions, V vocabulary, M members.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

WEIGHTINGS = ("uniform", "posterior")


class EnsembleConfig(PreTrainedConfig):
    """Which models, and how their probabilities are weighed.

    Args:
        members: their configs as dicts with `model_type`.
        weighting: `uniform`, or `posterior` by the likelihood of the tokens before.
        prior: probability of each member before any token; uniform if not given. `uniform` uses no prior.
        members_used: how many members are mixed, those of the largest weights, renormalised; None mixes all.

    Raises:
        ValueError: if a value does not fit.
    """

    model_type = "expertier_ensemble"

    members: list[dict[str, Any]] | None = None
    weighting: str = "posterior"
    prior: list[float] | None = None
    members_used: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        count = len(self.members or [])
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {self.weighting!r}")
        if self.prior is not None and (
            len(self.prior) != count or min(self.prior) <= 0 or abs(sum(self.prior) - 1) > 1e-6
        ):
            raise ValueError(f"prior must be {count} positive probabilities that sum to 1; got {self.prior}")
        if self.prior is not None and self.weighting == "uniform":
            raise ValueError("a uniform mixture takes no prior; use weighting='posterior'")
        if self.members_used is not None and not 1 <= self.members_used <= max(count, 1):
            raise ValueError(f"members_used must lie in 1..{count}; got {self.members_used}")
        sizes = {member.get("vocab_size") for member in self.members or []}
        if len(sizes) > 1:
            raise ValueError(f"members must share one vocabulary; got sizes {sorted(map(str, sizes))}")

    @property
    def member_configs(self) -> list[PreTrainedConfig]:
        """The members' configs."""
        return [AutoConfig.for_model(**member) for member in self.members or []]


class EnsembleCache(Cache):
    """The members' caches, and what the posterior remembers of a request.

    Args:
        members: one cache per member.
    """

    def __init__(self, members: Sequence[Cache]) -> None:
        super().__init__(layers=[layer for cache in members for layer in cache.layers])
        self.members = list(members)
        self.evidence_BM: Tensor | None = None
        self.last_BMV: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.members[0].get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for cache in self.members:
            cache.reorder_cache(beam_idx)
        if self.evidence_BM is not None:
            self.evidence_BM, self.last_BMV = self.evidence_BM[beam_idx], self.last_BMV[beam_idx]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("an ensemble cannot forget tokens: the evidence of earlier lengths is not kept")


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits are log probabilities of the mixture.

    Args:
        config: configs of the members, and how they are weighed.
    """

    config_class = EnsembleConfig
    base_model_prefix = "ensemble"
    _supports_sdpa = True

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        if not config.members:
            raise ValueError("an ensemble needs at least one member; got none")
        self.members = nn.ModuleList(AutoModelForCausalLM.from_config(member) for member in config.member_configs)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The members' caches and the evidence are made by the first call."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log probabilities of the mixture, and the loss when `labels` are given.

        Args:
            input_ids: int64 [B, S] vocabulary ids; with a cache, the new ones only.
            attention_mask: 0 for padding, which does not change the weights of members.
            past_key_values: of the calls before.
            labels: the same tokens as `input_ids`; -100 is ignored.
            use_cache: whether to return a cache.
            logits_to_keep: number of last positions to return; 0 returns all.
            **kwargs: handed to the members, such as `position_ids`.
        """
        if use_cache and past_key_values is None:
            past_key_values = EnsembleCache([DynamicCache(config=member.config) for member in self.members])
        log_prob_BMSV = self._member_log_probs(input_ids, attention_mask, past_key_values, kwargs)
        log_weight_BMS = self.log_weights(log_prob_BMSV, input_ids, attention_mask, past_key_values)
        logits = (log_weight_BMS[..., None] + log_prob_BMSV).logsumexp(dim=1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, kept], past_key_values=past_key_values)

    def log_weights(
        self,
        log_prob_BMSV: Tensor,
        token_BS: Tensor,
        attention_mask: Tensor | None = None,
        cache: EnsembleCache | None = None,
    ) -> Tensor:
        """[B, M, S]: the log weight of each member for the token after each position, from tokens up to it."""
        B, M, S, _ = log_prob_BMSV.shape
        if self.config.weighting == "uniform":
            log_weight = log_prob_BMSV.new_zeros(B, M, S)
        else:
            prior = self.config.prior or [1 / M] * M
            evidence = self._evidence(log_prob_BMSV, token_BS, attention_mask, cache)
            log_weight = log_prob_BMSV.new_tensor(prior).log()[:, None] + evidence
        if self.config.members_used is not None and self.config.members_used < M:
            best = log_weight.topk(self.config.members_used, dim=1).indices
            is_used = torch.zeros_like(log_weight, dtype=torch.bool).scatter(1, best, True)
            log_weight = log_weight.masked_fill(~is_used, -torch.inf)
        return log_weight.log_softmax(dim=1)

    def _member_log_probs(
        self, token_BS: Tensor, attention_mask: Tensor | None, cache: EnsembleCache | None, others: dict[str, Any]
    ) -> Tensor:
        found = []
        for index, member in enumerate(self.members):
            own = None if cache is None else cache.members[index]
            output = member(
                input_ids=token_BS,
                attention_mask=attention_mask,
                past_key_values=own,
                use_cache=own is not None,
                **others,
            )
            found.append(output.logits.float().log_softmax(dim=-1))
        return torch.stack(found, dim=1)

    def _evidence(
        self, log_prob_BMSV: Tensor, token_BS: Tensor, attention_mask: Tensor | None, cache: EnsembleCache | None
    ) -> Tensor:
        """[B, M, S]: log likelihood of the tokens up to each position, given those before them."""
        B, M, S, _ = log_prob_BMSV.shape
        has_past = cache is not None and cache.last_BMV is not None
        first_BM1V = cache.last_BMV[:, :, None] if has_past else torch.zeros_like(log_prob_BMSV[:, :, :1])
        before = torch.cat([first_BM1V, log_prob_BMSV[:, :, :-1]], dim=2)
        likelihood = before.gather(-1, token_BS[:, None, :, None].expand(B, M, S, 1)).squeeze(-1)
        if attention_mask is not None:
            valid_BS = attention_mask.bool()
            # a token is evidence if it and the one that predicts it are no padding
            is_evidence = valid_BS & pad(valid_BS, (1, 0))[:, :-1]
            likelihood = likelihood.masked_fill(~is_evidence[:, None, -S:], 0.0)
        evidence = likelihood.cumsum(dim=-1)
        if has_past:
            evidence = evidence + cache.evidence_BM[..., None]
        if cache is not None:
            cache.evidence_BM, cache.last_BMV = evidence[..., -1], log_prob_BMSV[:, :, -1]
        return evidence


def ensemble(
    members: Sequence[PreTrainedModel],
    *,
    weighting: str = "posterior",
    prior: Sequence[float] | None = None,
    members_used: int | None = None,
) -> EnsembleForCausalLM:
    """The ensemble of some loaded models; `save_pretrained` writes all of them into one checkpoint.

    Args:
        members: causal language models over one vocabulary, of any sizes and families.
        weighting, prior, members_used: how members are weighed; see `EnsembleConfig`.

    Raises:
        ValueError: if there is no member, or they do not fit together.
    """
    config = EnsembleConfig(
        members=[member.config.to_dict() for member in members],
        weighting=weighting,
        prior=None if prior is None else list(prior),
        members_used=members_used,
    )
    with torch.device("meta"):
        model = EnsembleForCausalLM(config)
    model.members = nn.ModuleList(members)
    model.generation_config.eos_token_id = getattr(members[0].config, "eos_token_id", None)
    return model.eval()


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM)
