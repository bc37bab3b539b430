"""A decoder layer's forward pass for one token: calls of C, and of modules for what is not C.

Shapes: D model width, H heads of queries, J heads of keys and values, W head width, A angles, S positions.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import EAGER
from ..kv_cache import can_extend
from ..linears import TokenWeight, plain_weight
from ..matvec import Matvecs
from ..rebinding import ReboundForward
from .attending import attends_like_torch
from .held import Held, is_read
from .parts import LayerParts
from .routed_block import RoutedBlock
from .structs import (
    Choice,
    Heads,
    Layer,
    Place,
    Router,
    Siblings,
    begin_attention,
    end_attention,
    norm_struct,
    siblings_struct,
    whole_attention,
)
from .token_room import RoomSizes, TokenRoom, TokenRooms

READ_OPTIONS = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"})
"""What decoder layers are given; all else has to be None or False, since nobody here looks at it."""
IMPLEMENTATION = "_attn_implementation_internal"
BYTES = 2  # of a bfloat16 number
MOST_SHARED_WIDTH = 256
"""Widest heads for which transformers lets torch share keys between heads of queries, rather than repeat them."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Rotation(NamedTuple):
    """Which columns of a head rotary positions rotate.

    Args:
        angles: A, cosines of a position.
        rotated: R, the first columns, which are as many or twice as many.
    """

    angles: int
    rotated: int


class Token(NamedTuple):
    """What a layer was given, where our C computes it.

    Args:
        x_11D: hidden numbers.
        cos_11A: cosines of the token's position.
        sin_11A: sines.
        cached: the layer's keys and values.
        mask: what attention is given besides; None where the token sees all keys.
    """

    x_11D: torch.Tensor
    cos_11A: torch.Tensor
    sin_11A: torch.Tensor
    cached: Any
    mask: torch.Tensor | None


class Seen:
    """What was looked at for another layer: cosines and sines of a position, and what the layer before has made."""

    def __init__(self) -> None:
        self._checked: Any = None
        self._made: Any = None

    def made(self, x_11D: torch.Tensor) -> torch.Tensor:
        """What a layer gives, which the next one need not look at."""
        self._made = x_11D
        return x_11D

    def is_read(self, x: torch.Tensor, width: int) -> bool:
        """Whether our C reads a token of this width."""
        if x is self._made and not torch.is_grad_enabled():
            return x.shape[2] == width
        return x.shape == (1, 1, width) and is_read(x)

    def are_read(self, embeddings: Any) -> bool:
        """Whether our C reads both, `[1, 1, A]` each."""
        if embeddings is self._checked is not None:
            return True
        if not isinstance(embeddings, tuple) or len(embeddings) != 2 or not all(map(is_read, embeddings)):
            return False
        cos, sin = embeddings
        is_one = cos.shape == sin.shape and cos.shape[:-1] == (1, 1)
        self._checked = embeddings if is_one and not torch.is_grad_enabled() else None
        return is_one


class PreparedLayer:
    """A decoder layer as C takes it, as long as its modules and weights stay where they are.

    Args:
        layer: a decoder layer, whose feed-forward is called.
        parts: what it computes with.
        rotation: how many columns of a head are rotated, and by how many angles.
        siblings: products of inputs, output and router.
        rooms: memory that all layers of the model share.
    """

    def __init__(
        self,
        layer: Any,
        parts: LayerParts,
        rotation: Rotation,
        siblings: tuple[Siblings, Siblings, Siblings | None],
        rooms: TokenRooms,
    ) -> None:
        self._angles = rotation.angles
        self._layer, self._parts = layer, parts
        width, scale = int(parts.output.out_features), _scale_of_torch(parts)
        heads = Heads(parts.heads, parts.shared_heads, parts.head_width, scale or 0.0)
        before, after = map(norm_struct, parts.norms)
        query, key = map(norm_struct, parts.head_norms)
        inputs, output, router = siblings
        routing = Router(router or Siblings(), None, width, Choice())
        self._struct = Layer(width, rotation.rotated, heads, before, query, key, after, inputs, output, routing)
        self._keeps = siblings
        self._router: TokenWeight | None = None if router is None else parts.router.weight
        experts = 0 if self._router is None else self._router.shape[0]
        self._sizes, self._all_rooms = RoomSizes(width, parts.heads, parts.head_width, experts), rooms
        self._rooms, self._routed = rooms.of(self._sizes, None), None
        self._begin, self._end, self._attend = begin_attention(), end_attention(), _attention(parts)
        self._whole = whole_attention() if scale is not None and attends_like_torch(heads, scale) else None
        self._config = vars(parts.attention.config)
        self._implementation = self._config.get(IMPLEMENTATION)
        modules = (parts.attention, *parts.attention.children(), *(norm.module for norm in parts.norms))
        self._held = Held((layer, parts.attention), parts.weights(), modules)

    @property
    def is_usable(self) -> bool:
        """Whether nobody listens to a module that would not be called, and attention is the one that was prepared."""
        is_same = self._config.get(IMPLEMENTATION) == self._implementation
        return is_same and not (self._held.wants_gradient or self._held.has_listeners or self._parts.attention.training)

    @property
    def is_current(self) -> bool:
        """Whether modules and weights are those that were prepared, where they were."""
        return self._held.is_current

    def of(self, twin: Any) -> "PreparedLayer":
        """The same for a module with the same weights and another feed-forward."""
        found = copy.copy(self)
        found._layer, found._router, found._routed = twin, None, None
        return found

    @property
    def leaves_out(self) -> bool:
        """Whether the feed-forward's module is not called."""
        return self._routed is not None

    def leave_out(self, routed: RoutedBlock | None) -> None:
        """From now on the experts are chosen here, and the feed-forward's module is not called."""
        if routed is None:
            return
        self._routed, self._struct.router = routed, routed.router
        if routed.product.is_wide:
            self._router = None
        self._rooms = self._all_rooms.of(self._sizes._replace(experts=routed.how.experts), routed.how)

    def __call__(self, token: Token) -> torch.Tensor:
        """What the layer gives, `[1, 1, D]`."""
        # what is done in Python is done before the first call of C, which fills the caches with weights
        x, room = token.x_11D, self._rooms.take()
        keys, values = token.cached.extend()
        out_11D = torch.empty_like(x)
        routed = self._routed
        if routed is not None and not (routed.is_usable and routed.is_itself):
            routed = None
        listens = routed is not None and routed.has_listeners
        step = None if routed is None or listens else routed.step()
        given = (self._struct, x.data_ptr(), token.cos_11A.data_ptr(), token.sin_11A.data_ptr(), self._angles)
        has_logits = self._router is not None or (routed is not None and routed.product.is_ours)
        logits = room.logits if has_logits else None
        choice = (None, None) if routed is None or logits is None else (room.expert, room.weight)
        sums, places = (room.sum, room.normed, logits, *choice), (_last_place(keys), _last_place(values))
        if self._whole is not None and token.mask is None and torch.backends.cuda.flash_sdp_enabled():
            has_chosen = self._whole(*given, *places, keys.shape[2], room.query, room.attended, *sums)
        else:
            self._begin(*given, room.query, *places)
            attended = self._attend(room.query_1H1W, keys, values, token.mask).contiguous()
            has_chosen = self._end(self._struct, x.data_ptr(), attended.data_ptr(), *sums)
        if routed is not None and logits is None:
            has_chosen = routed.choose(room.normed_1D, room)
        if routed is None or not has_chosen:
            torch.add(room.sum_11D, self._fed_forward(room), out=out_11D)
        elif listens:
            routed.by_module(room.normed_1D, room, room.sum_11D, out_11D)
        else:
            routed.compute(step, room.normed_1D, room, room.sum_11D, out_11D)
        self._rooms.give_back(room)
        return out_11D

    def _fed_forward(self, room: TokenRoom) -> torch.Tensor:
        """What the feed-forward's module gives; it is given copies, which somebody may keep."""
        feed_forward, normed_11D = self._layer._modules[self._parts.feed_forward], room.normed_11D.clone()
        if self._router is None:
            found = feed_forward(normed_11D)
        else:
            with self._router.known(normed_11D, room.logit_1E.clone()):
                found = feed_forward(normed_11D)
        fed: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return fed


def _last_place(states_1JSW: torch.Tensor) -> Place:
    positions, width = states_1JSW.shape[2:]
    return Place(states_1JSW.data_ptr() + (positions - 1) * width * BYTES, states_1JSW.stride(1))


def _scale_of_torch(parts: LayerParts) -> float | None:
    """What torch's own attention multiplies products by, where the module would call that; else None."""
    name, scale = vars(parts.attention.config).get(IMPLEMENTATION), parts.attention.scaling
    is_shared = parts.shared_heads < parts.heads
    is_torchs = name == "sdpa" and (parts.head_width <= MOST_SHARED_WIDTH or not is_shared)
    return scale if is_torchs and isinstance(scale, float) else None


def _attention(parts: LayerParts) -> Attend:
    """The attention function that the module would call, for one token."""
    attention = parts.attention
    bound = getattr(vars(attention).get("forward"), "__self__", None)
    function = bound.function if isinstance(bound, ReboundForward) else type(attention).forward
    name = vars(attention.config).get(IMPLEMENTATION)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, function.__globals__.get(EAGER))
    scaling, scale, is_shared = attention.scaling, _scale_of_torch(parts), parts.shared_heads < parts.heads

    def attend(query: Any, keys: Any, values: Any, mask: Any) -> torch.Tensor:
        if mask is None and scale is not None:
            return nn.functional.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=is_shared)
        found: torch.Tensor = interface(attention, query, keys, values, mask, dropout=0.0, scaling=scaling)[0]
        return found

    return attend


def prepare(
    layer: Any, parts: LayerParts, rotation: Rotation, matvecs: Matvecs, rooms: TokenRooms
) -> PreparedLayer | None:
    """A layer as C takes it; None if our products are not bit-identical to what `matvecs` promises.

    Args:
        layer: a decoder layer, whose feed-forward is called.
        parts: what it computes with.
        rotation: as for `PreparedLayer`.
        matvecs: chooses orders of summation.
        rooms: memory that all layers of the model share.
    """
    linears = [parts.inputs, (parts.output,)]
    found = []
    for group in linears:
        weights, biases = [linear.weight for linear in group], [linear.bias for linear in group]
        if (order := matvecs.common_order(weights, biases)) is None:
            return None
        found.append(siblings_struct(order, weights, biases))
    router = None
    if parts.router is not None:
        plain, bias = plain_weight(parts.router.weight), getattr(parts.router, "bias", None)
        usable = plain.is_contiguous() and plain.shape[1] == parts.output.out_features
        if usable and (order := matvecs.common_order([plain], [bias])) is not None:
            router = siblings_struct(order, [plain], [bias])
    return PreparedLayer(layer, parts, rotation, (found[0], found[1], router), rooms)


class TokenLayer:
    """The forward pass of one decoder layer; a method, so that a copied model has copies of its own.

    Args:
        layer: a decoder layer of the common form.
        parts: what it computes with.
        prepare: gives the layer as C takes it with the number of threads in use and so many angles, or None where the
            modules compute.
        seen: shared by all layers of the model.
    """

    def __init__(
        self,
        layer: nn.Module,
        parts: LayerParts,
        prepare: Callable[[nn.Module, LayerParts, int], PreparedLayer | None],
        seen: Seen,
    ) -> None:
        self._layer, self._parts, self._prepare, self._seen = layer, parts, prepare, seen
        self._otherwise = layer.forward
        self._prepared: dict[tuple[int, int], PreparedLayer | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenLayer":
        """Addresses are those of the original, so a copy prepares its own."""
        copied = memo[id(self)] = TokenLayer.__new__(TokenLayer)
        copied._layer, copied._parts = copy.deepcopy(self._layer, memo), copy.deepcopy(self._parts, memo)
        copied._otherwise, copied._prepare = copy.deepcopy(self._otherwise, memo), self._prepare
        copied._seen, copied._prepared = self._seen, {}
        return copied

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes; anything but one token with a cache of ours by its modules."""
        token = None if args or torch.compiler.is_compiling() else self._token(hidden_states, kwargs)
        prepared = None if token is None else self.prepared(token.cos_11A.shape[-1])
        if token is None or prepared is None or not prepared.is_usable:
            return self._otherwise(hidden_states, *args, **kwargs)
        return self._seen.made(prepared(token))

    def prepared(self, angles: int) -> PreparedLayer | None:
        """The layer as C takes it with the number of threads in use; tried when it is first asked for.

        A layer whose modules or weights were exchanged is left to its modules from then on.

        Args:
            angles: A, cosines of a position.
        """
        key = (torch.get_num_threads(), angles)
        if key not in self._prepared:
            self._prepared[key] = self._prepare(self._layer, self._parts, angles)
        found = self._prepared[key]
        if found is not None and not found.is_current:
            found = self._prepared[key] = None
        return found

    def _token(self, x: torch.Tensor, options: dict[str, Any]) -> Token | None:
        """What our C reads of a call; None if it computes something else."""
        width, attention = self._parts.output.out_features, self._parts.attention
        if not self._seen.is_read(x, width):
            return None
        for name, value in options.items():
            if name not in READ_OPTIONS and value is not None and value is not False:
                return None
        embeddings, cache = options.get("position_embeddings"), options.get("past_key_values")
        layers, number = getattr(cache, "layers", ()), attention.layer_idx
        if not self._seen.are_read(embeddings) or not 0 <= number < len(layers):
            return None
        shape = (self._parts.shared_heads, self._parts.head_width)
        if not can_extend(layers[number], shape):
            return None
        return Token(x, *embeddings, layers[number], options.get("attention_mask"))
