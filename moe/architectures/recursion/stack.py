"""The order of a mixture of recursions: first layers, a block again and again for ever fewer tokens, last layers.

Shapes: B batch, S positions, U tokens of a pass, T tokens, D model width, J recursions.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from routing import Carry, RouterStats, RoutingContext

from ...layers.stack import LayerPasses, Stack, StackInputs, StackOutput
from ...parts.attention import BorrowedKeys
from ...parts.flops import projection_flops
from .cache import KeptKeys, RecursionKeys, Subset, recursion_layers, visible_mask
from .depth import ExpertChoiceDepth, TokenChoiceDepth

KeySharing = Literal["recursion", "first"]


class RecursionStack(Stack):
    """Runs the layers of `block` up to J times; the layers before and after it once.

    Args:
        recursions: J, passes at most.
        block: the decoder layers that recur.
        num_layers: decoder layers in all.
        depth: who goes on; None lets every token pass all recursions.
        keys: `recursion` gives each recursion keys of its own, of the tokens alive in it; `first` lets all recursions
            read the first one's keys, those of all tokens.
    """

    def __init__(
        self,
        recursions: int,
        block: range,
        num_layers: int,
        depth: ExpertChoiceDepth | TokenChoiceDepth | None,
        keys: KeySharing,
    ) -> None:
        super().__init__()
        self.recursions, self.block, self.num_layers, self.keys = recursions, block, num_layers, keys
        self.depth = depth

    @property
    def is_causal(self) -> bool:
        return self.depth is None or self.depth.is_causal

    @property
    def flops(self) -> float:
        """The routers that a token passes; in expert choice at most so many."""
        return projection_flops(self.depth)

    def post_step(self) -> None:
        if isinstance(self.depth, TokenChoiceDepth):
            self.depth.post_step()

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        run = _Run(self, layers, carry, inputs, x_BSD.shape)
        x_BSD = run.once(range(self.block.start), x_BSD)
        if isinstance(self.depth, ExpertChoiceDepth):
            x_BSD, losses = self._expert_choice(self.depth, run, x_BSD)
        elif isinstance(self.depth, TokenChoiceDepth):
            x_BSD, losses = self._token_choice(self.depth, run, x_BSD)
        else:
            losses = {}
            for recursion in range(self.recursions):
                x_BSD = run.recur(recursion, x_BSD, run.is_valid_BS)
        x_BSD = run.once(range(self.block.stop, self.num_layers), x_BSD)
        return StackOutput(x_BSD=x_BSD, router_stats=run.router_stats(), losses=losses, passes=run.passes())

    def _expert_choice(self, depth: ExpertChoiceDepth, run: "_Run", x_BSD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`x + g f(x)` for the tokens that a recursion picks among those of the one before."""
        losses: dict[str, Tensor] = {}
        is_alive_BS = run.is_valid_BS
        for recursion in range(self.recursions):
            choice = depth(recursion, x_BSD, is_alive_BS, run.is_valid_BS, run.context.is_training)
            is_alive_BS = choice.is_alive_BS
            y_BSD = run.recur(recursion, x_BSD, is_alive_BS)
            gated_BSD = x_BSD + choice.gate_BS.to(x_BSD.dtype)[..., None] * y_BSD
            x_BSD = torch.where(is_alive_BS[..., None], gated_BSD, x_BSD)
            for name, loss in choice.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
        return x_BSD, losses

    def _token_choice(self, depth: TokenChoiceDepth, run: "_Run", x_BSD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`h1 + g f(...f(h1))`, as many times as the token was given."""
        choice = depth(x_BSD, run.is_valid_BS, run.context.is_training)
        first_BSD = x_BSD
        for recursion in range(self.recursions):
            x_BSD = run.recur(recursion, x_BSD, choice.is_alive_BS[recursion])
        return first_BSD + choice.gate_BS.to(x_BSD.dtype)[..., None] * x_BSD, choice.losses


class _Run:
    """One forward pass: what its passes through layers share and leave behind."""

    def __init__(
        self, stack: RecursionStack, layers: Sequence[nn.Module], carry: Carry, inputs: StackInputs, shape: torch.Size
    ) -> None:
        self._stack, self._layers, self._carry, self._inputs = stack, layers, carry, inputs
        self._num_rows, self._num_positions = shape[0], shape[1]
        self.context: RoutingContext = inputs.context
        valid_T, device = self.context.is_valid_T, inputs.angles[0].device
        all_BS = torch.ones(shape[:2], dtype=torch.bool, device=device)
        self.is_valid_BS = all_BS if valid_T is None else valid_T.view(shape[:2])
        cache = inputs.cache
        past = 0 if cache is None else cache.get_seq_length()
        self._column_S = past + torch.arange(shape[1], device=device)
        self._kept = KeptKeys(cache)
        self._calls: dict[int, list[list[RouterStats]]] = defaultdict(list)
        self._recursion_passes: list[LayerPasses] = []
        for recursion in range(1, stack.recursions if cache is not None and stack.keys == "recursion" else 1):
            for layer in recursion_layers(cache, recursion, stack.block, stack.num_layers).values():
                layer.num_columns = past + shape[1]

    def once(self, layers: range, x_BSD: Tensor) -> Tensor:
        """All tokens through some layers."""
        x_BSD, self._carry = self._through(layers, x_BSD, self._carry, self._inputs)
        return x_BSD

    def recur(self, recursion: int, x_BSD: Tensor, is_alive_BS: Tensor) -> Tensor:
        """The tokens that are alive through the block; the others stay as they are (in recursion 0: are of no use)."""
        block = self._stack.block
        if recursion == 0:
            cache = self._kept if self._stack.keys == "first" else self._inputs.cache
            x_BSD, self._carry = self._through(block, x_BSD, self._carry, replace(self._inputs, cache=cache))
            return x_BSD
        if not is_alive_BS.any():
            self._recursion_passes.append(LayerPasses(tokens=0.0, keys=0.0, visible=0.0))
            return x_BSD
        subset = Subset.of(is_alive_BS)
        inputs = self._subset_inputs(recursion, subset)
        token_T = subset.token_T(self._num_positions)
        y_BUD, carry = self._through(block, subset.gather(x_BSD), self._carry.gather(token_T), inputs)
        self._carry = self._merged(carry, token_T, subset.is_valid_BU.flatten())
        return subset.scatter(x_BSD, y_BUD)

    def router_stats(self) -> list[RouterStats]:
        """One per router, its calls in all recursions joined."""
        per_layer = [zip(*calls, strict=True) for _, calls in sorted(self._calls.items())]
        return [RouterStats.joined(calls) for layer in per_layer for calls in layer]

    def passes(self) -> list[LayerPasses]:
        """Per decoder layer; the first recursion is whole."""
        later = self._recursion_passes
        block = LayerPasses(
            tokens=1 + sum(one.tokens for one in later),
            keys=1 + sum(one.keys for one in later),
            visible=1 + sum(one.visible for one in later),
        )
        return [block if layer in self._stack.block else LayerPasses() for layer in range(self._stack.num_layers)]

    def _through(self, layers: range, x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry]:
        for layer in layers:
            x_BSD, carry, stats = self._layers[layer](x_BSD, carry, inputs)
            self._calls[layer].append(stats)
        return x_BSD, carry

    def _subset_inputs(self, recursion: int, subset: Subset) -> StackInputs:
        stack, inputs = self._stack, self._inputs
        column_BU = subset.gather(self._column_S[None])
        key_BU = column_BU.masked_fill(~subset.is_valid_BU, -1)
        if stack.keys == "first":
            cache: BorrowedKeys | RecursionKeys | None = BorrowedKeys(self._kept.kept)
            mask = self._full_mask(subset, column_BU)
        else:
            seen_BY, cache = key_BU, None
            if inputs.cache is not None:
                layers = recursion_layers(inputs.cache, recursion, stack.block, stack.num_layers)
                cache, past_BY = RecursionKeys(layers, key_BU), layers[stack.block.start].column_BY
                seen_BY = key_BU if past_BY is None else torch.cat([past_BY, key_BU], dim=1)
            mask = visible_mask(seen_BY, column_BU, subset.is_valid_BU)
        self._note_passes(subset, mask)
        angles = tuple(subset.gather(angle[:, 0])[:, None] for angle in inputs.angles)
        return StackInputs(angles=angles, mask=mask, cache=cache, context=self._subset_context(subset))

    def _full_mask(self, subset: Subset, column_BU: Tensor) -> Tensor:
        """Over the first recursion's keys, which are those of all columns."""
        num_keys = next(iter(self._kept.kept.values()))[0].shape[2]
        if self._inputs.mask is not None:
            mask = subset.gather(self._inputs.mask[:, 0])[:, None]
            return mask | ~subset.is_valid_BU[:, None, :, None]
        column_BY = torch.arange(num_keys, device=column_BU.device).expand(len(column_BU), -1)
        return visible_mask(column_BY, column_BU, subset.is_valid_BU)

    def _subset_context(self, subset: Subset) -> RoutingContext:
        token_T, context = subset.token_T(self._num_positions), self.context

        def of(x_T: Tensor | None) -> Tensor | None:
            return None if x_T is None else x_T[token_T]

        return replace(
            context,
            token_id_T=of(context.token_id_T),
            position_T=of(context.position_T),
            sequence_T=of(context.sequence_T),
            is_valid_T=None if subset.is_valid_BU.all() else subset.is_valid_BU.flatten(),
        )

    def _merged(self, carry: Carry, token_T: Tensor, is_valid_T: Tensor) -> Carry:
        """The carry of all tokens, renewed for those that passed."""
        token_T = token_T[is_valid_T]
        renewed = {
            name: self._carry.tensors[name].index_put((token_T,), value[is_valid_T])
            for name, value in carry.tensors.items()
        }
        return self._carry.put(**renewed)

    @torch.no_grad()
    def _note_passes(self, subset: Subset, mask: Tensor) -> None:
        num_tokens = int(self.is_valid_BS.sum())
        share = int(subset.is_valid_BU.sum()) / num_tokens
        pairs = int((mask[:, 0] & subset.is_valid_BU[:, :, None]).sum())
        length_B = self.is_valid_BS.sum(dim=1)
        whole = int((length_B * (length_B + 1) // 2).sum())
        keys = 0.0 if self._stack.keys == "first" else share
        self._recursion_passes.append(LayerPasses(tokens=share, keys=keys, visible=pairs / whole))
