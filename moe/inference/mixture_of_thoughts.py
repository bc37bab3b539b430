"""Mixture of Thoughts: frozen models that think side by side, of which a primary one reads the others' states.

Each member's layers are cut into Q runs. After each run the active members' streams are projected to a common width;
the primary one attends to all of them, causally, and adds what it read, projected back, to its own stream. A router
chooses the K active members per sequence, and the likeliest is primary. Only router and interactions are trained.

    h_p <- h_p + back_p( softmax(q k^T) v ),   q = Q project_p(h_p),   k, v = K, V concat_m project_m(h_m)

Source: Fein-Ashley et al. 2025 (Mixture of Thoughts), arXiv:2509.21164, sections 2-3, from its abstract and reviews.
Ours: the router reads the mean of the members' embeddings of the first token on, weights of members multiply their
values so that the loss reaches the router, and back projections start at 0.

Shapes: B sequences, S positions, D model width, M members, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers.masking_utils import create_causal_mask

from routing import Carry, RoutingContext

from ..layers.stack import Stack, StackInputs
from ..model.decoder import MoEForCausalLM
from ..model.decoder_layer import DecoderLayer
from ..parts.attention import rotary_angles


class MixtureOfThoughts(nn.Module):
    """Several of our decoders over one vocabulary, joined by trained interaction layers; their weights are frozen.

    Args:
        members: M models of ours with plain decoder layers, of any sizes.
        width: of the common space.
        levels: Q, interactions, at most the layers of the shallowest member.
        num_heads: of the cross-attention; divides the width.
        members_used: K, active members per sequence; None for all.

    Raises:
        ValueError: if numbers do not fit, or a member runs its layers in a way of its own.
    """

    def __init__(
        self,
        members: Sequence[MoEForCausalLM],
        *,
        width: int = 64,
        levels: int = 2,
        num_heads: int = 2,
        members_used: int | None = None,
    ) -> None:
        super().__init__()
        _expect_fitting(members, width, levels, num_heads, members_used)
        self.members = nn.ModuleList(members).requires_grad_(False)
        self.members_used = len(members) if members_used is None else members_used
        sizes = [member.config.hidden_size for member in members]
        self.router = nn.Linear(sum(sizes), len(members), bias=False)
        self.levels = nn.ModuleList(Interaction(sizes, width, num_heads) for _ in range(levels))
        nn.init.zeros_(self.router.weight)

    def forward(self, token_BS: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [B, S, V] of each sequence's primary member, and the loss when labels are given.

        Args:
            token_BS: int64 ids of whole sequences, without padding.
            labels: the same tokens; the shift happens here.
        """
        logits, weight_BM = torch.zeros(*token_BS.shape, self.members[0].config.vocab_size), self.weights(token_BS)
        primary_B = weight_BM.argmax(dim=-1)
        for number in primary_B.unique().tolist():
            row = (primary_B == number).nonzero()[:, 0]
            logits = logits.to(weight_BM).index_copy(0, row, self._think(token_BS[row], weight_BM[row], number))
        if labels is None:
            return logits, None
        return logits, cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    def weights(self, token_BS: Tensor) -> Tensor:
        """[B, M]: each sequence's weights of its active members, which sum to 1; 0 for the others.

        The first token decides, which all later ones may see.
        """
        first = torch.cat([member.model.embed_tokens(token_BS[:, 0]) for member in self.members], dim=-1)
        share_BM = self.router(first).softmax(dim=-1)
        kept = share_BM.detach().topk(self.members_used, dim=-1).indices
        share_BM = share_BM * torch.zeros_like(share_BM).scatter(1, kept, 1.0)
        return share_BM / share_BM.sum(dim=-1, keepdim=True)

    def _think(self, token_BS: Tensor, weight_BM: Tensor, primary: int) -> Tensor:
        active = [number for number in range(len(self.members)) if (weight_BM[:, number] > 0).any()]
        walks = {number: _Walk(self.members[number], token_BS, len(self.levels)) for number in active}
        for level, interaction in enumerate(self.levels):
            for walk in walks.values():
                walk.run(level)
            streams = {number: walk.x_BSD for number, walk in walks.items()}
            walks[primary].x_BSD = interaction(streams, weight_BM, primary)
        member = self.members[primary]
        return member.lm_head(member.model.norm(walks[primary].x_BSD))


class _Walk:
    """One member on its way through its layers, in as many runs as there are levels."""

    def __init__(self, member: MoEForCausalLM, token_BS: Tensor, levels: int) -> None:
        self.layers, self.levels, config = list(member.model.layers), levels, member.config
        self.x_BSD = member.model.embed_tokens(token_BS)
        B, S = token_BS.shape
        position_1S = torch.arange(S, device=token_BS.device)[None]
        context = RoutingContext(
            token_id_T=token_BS.flatten(),
            position_T=position_1S.expand(B, S).flatten(),
            sequence_T=torch.arange(B, device=token_BS.device).repeat_interleave(S),
        )
        mask = create_causal_mask(
            config=config, inputs_embeds=self.x_BSD, attention_mask=None, past_key_values=None, position_ids=position_1S
        )
        angles = rotary_angles(position_1S, config.head_dim, config.rope_theta)
        self.inputs = StackInputs(angles=angles, mask=mask, cache=None, context=context)
        routers = member.model.routers
        self.carry = routers[0].begin(context) if routers else Carry()

    def run(self, level: int) -> None:
        """The layers of one level."""
        count = len(self.layers)
        for layer in self.layers[count * level // self.levels : count * (level + 1) // self.levels]:
            self.x_BSD, self.carry, _ = layer(self.x_BSD, self.carry, self.inputs)


class Interaction(nn.Module):
    """Cross-attention of one member's stream to those of all active members, in a common space.

    Args:
        sizes: D of each member.
        width: of the common space.
        num_heads: of the attention; divides the width.
    """

    def __init__(self, sizes: Sequence[int], width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.ModuleList(nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for size in sizes)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.back = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        for back in self.back:
            nn.init.zeros_(back.weight)

    def forward(self, streams: dict[int, Tensor], weight_BM: Tensor, primary: int) -> Tensor:
        """[B, S, D]: the primary member's stream with what it read."""
        common = {number: self.project[number](x_BSD) for number, x_BSD in streams.items()}
        query = self._heads(self.query(common[primary]))
        keys, values, masks = [], [], []
        S = query.shape[2]
        is_earlier_SS = torch.ones(S, S, dtype=torch.bool, device=query.device).tril()
        for number, shared in common.items():
            keys.append(self._heads(self.key(shared)))
            values.append(self._heads(self.value(shared) * weight_BM[:, number, None, None]))
            masks.append(is_earlier_SS & (weight_BM[:, number] > 0)[:, None, None, None])
        read = scaled_dot_product_attention(
            query, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=torch.cat(masks, dim=-1)
        )
        return streams[primary] + self.back[primary](read.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _expect_fitting(
    members: Sequence[MoEForCausalLM], width: int, levels: int, num_heads: int, members_used: int | None
) -> None:
    if not members or len({member.config.vocab_size for member in members}) > 1:
        raise ValueError(f"expected at least one member, all of one vocabulary; got {len(members)} members")
    for member in members:
        plain = type(member.model.stack) is Stack and all(type(layer) is DecoderLayer for layer in member.model.layers)
        if not plain:
            raise ValueError(
                f"members need plain decoder layers in a row; architecture {member.config.architecture!r} has others"
            )
    shallowest = min(member.config.num_hidden_layers for member in members)
    if not 1 <= levels <= shallowest or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"levels must lie in 1..{shallowest}, the layers of the shallowest member, and heads divide the width; "
            f"got {levels}, {num_heads}, {width}"
        )
    if members_used is not None and not 1 <= members_used <= len(members):
        raise ValueError(f"members_used must lie in 1..{len(members)}; got {members_used}")
