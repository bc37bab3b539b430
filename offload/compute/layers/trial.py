"""Which decoder layers our C computes for a token: those of the common form, as a trial of each of them shows.

The trial compares the sum that a layer gives, and the keys and values that it caches, with those of its modules, bit by
bit. A layer of another form (scaled sums, further norms, parallel branches) differs in every number.

Shapes: D model width, J heads of keys and values, W head width, A angles.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from ..kv_cache import grow_in_place
from ..matvec import Matvecs
from ..rotary import rotated_columns
from .parts import LayerParts, find_parts
from .routed_block import PLACE, find_routed_block
from .structs import begin_attention
from .token_block import TokenBlock
from .token_layer import PreparedLayer, Rotation, Seen, Token, TokenLayer, prepare
from .token_room import TokenRooms

FREQUENCIES = "inv_freq"
"""How the names of buffers end that hold a model's rotary frequencies."""
TRIED_POSITIONS = 5
"""Positions in the cache of a trial; how attention sums is tried by itself, at other lengths."""
TRIED_SCALES = (1.0, 0.1, 30.0)
"""Sizes of the hidden numbers of a trial; small ones show where a norm adds its epsilon.

Only the first layer of a class is tried with all of them."""


class Quickened(NamedTuple):
    """What our C computes for single tokens.

    Args:
        whole_layers: decoder layers as a whole.
        whole_blocks: feed-forwards of routed experts without their modules, in those layers and in others.
    """

    whole_layers: int
    whole_blocks: int


def quicken_layers(model: nn.Module, matvecs: Matvecs) -> Quickened:
    """Let the decoder layers of a model compute single tokens by our C, where it gives the same bits.

    Of layers that are of another form, the feed-forward with routed experts.

    Norms, linear layers and attention have been quickened before.

    Args:
        model: in eval mode, with a config.
        matvecs: chooses orders of summation.

    Returns:
        How many are computed so.
    """
    if begin_attention() is None:
        return Quickened(0, 0)
    config, layers, blocks = model.config.get_text_config(), 0, 0
    whole: set[nn.Module] = set()
    known: set[type] = set()
    rooms = TokenRooms()
    seen, likely = Seen(), _likely_angles(model)
    for layer in list(model.modules()):
        if (parts := find_parts(layer)) is None:
            continue
        tried = partial(_tried, config=config, matvecs=matvecs, known=known, rooms=rooms)
        token_layer = TokenLayer(layer, parts, tried, seen)
        tries = map(token_layer.prepared, likely or (parts.head_width,))
        if (prepared := next((each for each in tries if each is not None), None)) is not None:
            layer.forward = token_layer.forward
            whole.add(layer._modules[parts.feed_forward])  # type: ignore[arg-type]
            layers, blocks = layers + 1, blocks + prepared.leaves_out
    for block in list(model.modules()):
        is_own = block not in whole and "forward" not in vars(block)
        if is_own and any(hasattr(child, PLACE) for child in block.children()):
            token_block = TokenBlock(block, partial(find_routed_block, matvecs=matvecs), rooms)
            if token_block.prepared() is not None:
                block.forward = token_block.forward
                blocks += 1
    return Quickened(layers, blocks)


def _likely_angles(model: nn.Module) -> list[int]:
    """Cosines of a position: mostly two for each frequency that a model has, else one."""
    frequencies = [len(buffer) for name, buffer in model.named_buffers() if name.endswith(FREQUENCIES) and buffer.dim()]
    return list(dict.fromkeys([*(2 * count for count in frequencies), *frequencies]))


@torch.no_grad()
def _tried(
    layer: nn.Module, parts: LayerParts, angles: int, config: Any, matvecs: Matvecs, known: set[type], rooms: TokenRooms
) -> PreparedLayer | None:
    """A layer as C takes it, if it is bit-identical to its modules; its class is known then."""
    scales = TRIED_SCALES[:1] if type(layer) in known else TRIED_SCALES
    for rotated in rotated_columns(parts.head_width, angles):
        for is_pair in (False, True):
            try:
                if (prepared := prepare(layer, parts, Rotation(angles, rotated), matvecs, rooms)) is None:
                    return None
                twin = _twin(layer, parts, is_pair)
                if all(_agrees(twin, prepared.of(twin), parts, config, angles, scale) for scale in scales):
                    known.add(type(layer))
                    prepared.leave_out(find_routed_block(layer._modules[parts.feed_forward], matvecs))
                    return prepared
            except Exception:  # of a layer that is something else, which fails in its own way
                continue
    return None


class _FeedForward(nn.Module):
    """Stands for a layer's feed-forward, which may have to read experts from disk."""

    def __init__(self, is_pair: bool) -> None:
        super().__init__()
        self._is_pair = is_pair

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = x.flip(-1) * 0.5
        return (found, None) if self._is_pair else found


def _twin(layer: nn.Module, parts: LayerParts, is_pair: bool) -> Any:
    """The same layer with another feed-forward."""
    twin = copy.copy(layer)
    vars(twin).pop("forward", None)
    twin._modules = {**layer._modules, parts.feed_forward: _FeedForward(is_pair)}
    return twin


def _agrees(twin: Any, ours: PreparedLayer, parts: LayerParts, config: Any, angles: int, scale: float) -> bool:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x_11D, cos_11A, sin_11A = (
        normal(1, 1, parts.output.out_features) * scale,
        normal(1, 1, angles),
        normal(1, 1, angles),
    )
    held = [normal(1, parts.shared_heads, TRIED_POSITIONS, parts.head_width) for _ in range(2)]
    number, caches = parts.attention.layer_idx, [DynamicCache(config=config) for _ in range(2)]
    for cache in caches:
        grow_in_place(cache)
        cache.layers[number].update(*held)
    expected = twin(
        x_11D, attention_mask=None, position_ids=torch.tensor([[TRIED_POSITIONS]]), past_key_values=caches[0],
        use_cache=True, position_embeddings=(cos_11A, sin_11A),
    )  # fmt: skip
    found = ours(Token(x_11D, cos_11A, sin_11A, caches[1].layers[number], None))
    first, second = (cache.layers[number] for cache in caches)
    is_cached = torch.equal(first.keys, second.keys) and torch.equal(first.values, second.values)
    return isinstance(expected, torch.Tensor) and is_cached and torch.equal(expected, found)
