"""ParScale: P streams of the same tokens through the same weights, told apart by learned prefixes, then mixed.

A weight that is read once is multiplied P times: more arithmetic per byte, which is what offloaded experts lack.

    x = sum_p w_p x_p,   w = (1 - e) softmax(MLP(x_1, ..., x_P)) + e / P

Source: Chen et al. 2025 (ParScale), arXiv:2505.10475, section 2: prefixes in every layer's keys and values, a dynamic
weighted sum with smoothing e. There streams are mixed after the final norm; here before it, by weights of normed ones.

Shapes: B batch, S positions, D model width, P streams, H key/value heads, A = head width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from routing import Carry, RoutingContext

from ...layers.stack import LayerPasses, Stack, StackInputs, StackOutput
from ...parts.attention import BorrowedKeys, KeyValues
from ...parts.config import MoEConfig
from ...parts.flops import projection_flops
from ..body import Body
from ..plain import plain


def parallel_streams(config: MoEConfig, *, streams: int = 2, prefix: int = 8, smoothing: float = 0.1) -> Body:
    """The plain architecture, passed `streams` times at once.

    Args:
        streams: P, at least 1.
        prefix: learned keys and values of each stream, layer and head; 0 makes all streams equal.
        smoothing: e, the share of the weights that is spread evenly, 0 to 1.

    Raises:
        ValueError: if a number is out of range, or the router counts its experts per token of the text.
    """
    if streams < 1 or prefix < 0 or not 0 <= smoothing <= 1:
        raise ValueError(
            f"expected at least 1 stream, a prefix from 0 up and a smoothing in 0..1; got {streams}, {prefix}, "
            f"{smoothing}"
        )
    if config.router == "remoe":
        raise ValueError("remoe counts active experts per token, which passes several streams; take another router")
    body = plain(config)
    return replace(body, stack=ParallelStack(config, streams, prefix, smoothing))


class ParallelStack(Stack):
    """Runs the layers once over all streams, which are rows of one batch, and mixes what comes out.

    Args:
        streams, prefix, smoothing: as for `parallel_streams`.
    """

    def __init__(self, config: MoEConfig, streams: int, prefix: int, smoothing: float) -> None:
        super().__init__()
        self.streams, self.smoothing = streams, smoothing
        shape = (config.num_hidden_layers, streams, config.num_key_value_heads, prefix, config.head_dim)
        self.prefix_keys, self.prefix_values = (nn.Parameter(torch.empty(shape)) if prefix else None for _ in range(2))
        D = config.hidden_size
        self.mixer = nn.Sequential(nn.Linear(streams * D, D), nn.SiLU(), nn.Linear(D, streams)) if streams > 1 else None

    @property
    def flops(self) -> float:
        """Of the mixing weights."""
        return projection_flops(self.mixer)

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        B, P = len(x_BSD), self.streams
        token = torch.arange(x_BSD.shape[0] * x_BSD.shape[1], device=x_BSD.device).repeat(P)
        output = super().forward(layers, x_BSD.repeat(P, 1, 1), carry.gather(token), self._inputs(inputs, x_BSD))
        x_PBSD = output.x_BSD.unflatten(0, (P, B))
        passes = [LayerPasses(tokens=P, keys=P, visible=P)] * len(layers)
        return replace(output, x_BSD=self._mixed(x_PBSD), passes=passes if P > 1 else None)

    def _mixed(self, x_PBSD: Tensor) -> Tensor:
        if self.mixer is None:
            return x_PBSD[0]
        read = rms_norm(x_PBSD, x_PBSD.shape[-1:]).permute(1, 2, 0, 3).flatten(2)
        exact = torch.promote_types(x_PBSD.dtype, torch.float32)
        weight_BSP = self.mixer(read).softmax(dim=-1, dtype=exact).to(x_PBSD.dtype)
        weight_BSP = weight_BSP * (1 - self.smoothing) + self.smoothing / self.streams
        return torch.einsum("bsp,pbsd->bsd", weight_BSP, x_PBSD)

    def _inputs(self, inputs: StackInputs, x_BSD: Tensor) -> StackInputs:
        """What the layers see: everything once per stream, and the prefixes before all keys."""
        (B, S, _), P = x_BSD.shape, self.streams
        prefix = 0 if self.prefix_keys is None else self.prefix_keys.shape[3]
        mask = inputs.mask
        if mask is None and prefix and S > 1:  # plain causal attention: no keys of earlier calls
            mask = torch.ones(S, S, dtype=torch.bool, device=x_BSD.device).tril()[None, None]
        if mask is not None:
            mask = pad(mask, (prefix, 0), value=True if mask.dtype == torch.bool else 0.0)
            mask = _per_stream(mask, B, P)
        return replace(
            inputs,
            angles=tuple(_per_stream(angle, B, P) for angle in inputs.angles),
            mask=mask,
            cache=StreamKeys(inputs.cache, self) if prefix or inputs.cache is not None else None,
            context=_repeated(inputs.context, B, P, mask),
        )


class StreamKeys:
    """A cache of one row per sequence, for rows of several streams, with each stream's prefix before its keys.

    Streams lie beside each other as heads, so beams and cropping treat a sequence's streams alike.

    Args:
        cache: holds the keys of earlier calls; None where there are none.
        stack: has the prefixes.
    """

    def __init__(self, cache: KeyValues | BorrowedKeys | None, stack: ParallelStack) -> None:
        self.cache, self.stack = cache, stack

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values [P B, H, S, A]; all that its queries may look at."""
        P = self.stack.streams
        if self.cache is not None:
            folded = (x.unflatten(0, (P, -1)).transpose(0, 1).flatten(1, 2) for x in (key, value))
            seen = self.cache.update(*folded, layer_idx)
            key, value = (x.unflatten(1, (P, -1)).transpose(0, 1).flatten(0, 1) for x in seen)
        if self.stack.prefix_keys is None:
            return key, value
        pairs = ((self.stack.prefix_keys, key), (self.stack.prefix_values, value))
        return tuple(torch.cat([_rows(prefix[layer_idx], len(x) // P).to(x.dtype), x], dim=2) for prefix, x in pairs)


def _rows(prefix_PHSA: Tensor, B: int) -> Tensor:
    return prefix_PHSA.repeat_interleave(B, dim=0)


def _per_stream(x: Tensor, B: int, P: int) -> Tensor:
    """Rows of a batch once per stream; what holds for every row stays as it is."""
    return x.repeat(P, *[1] * (x.ndim - 1)) if len(x) == B and B > 1 else x


def _repeated(context: RoutingContext, B: int, P: int, mask: Tensor | None) -> RoutingContext:
    """Token-aligned fields once per stream; each stream's sequences count as sequences of their own."""
    fields = ("token_id_T", "position_T", "is_valid_T", "modality_T")
    found = {name: value.repeat(P) for name in fields if (value := getattr(context, name)) is not None}
    if context.condition_TD is not None:
        found["condition_TD"] = context.condition_TD.repeat(P, 1)
    if context.sequence_T is not None:
        found["sequence_T"] = torch.cat([context.sequence_T + B * stream for stream in range(P)])
    return replace(context, attention_mask=mask, **found)
