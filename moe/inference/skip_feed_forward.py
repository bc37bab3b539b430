"""FFN-SkipLLM: leave out feed-forward layers while decoding, for any decoder of transformers; attention always runs.

Per token, from the first layer to the last: once a feed-forward turned the residual stream by so little that the cosine
of before and after reaches the threshold, the feed-forwards that follow are skipped, up to the last layers. The first
and last layers always run theirs, and so do the first tokens of a request. Keys and values are those of every layer.

Source: Jaiswal et al. 2024 (FFN-SkipLLM), arXiv:2404.03865, section 3 and algorithm 1.

Shapes: B sequences, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from routing import PreGate

from ..layers.layer import RoutedLayer

FEED_FORWARD_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
NORM_AFTER = "post_feedforward_layernorm"


@dataclass(kw_only=True, eq=False)
class SkipReport:
    """What was skipped so far.

    Args:
        skipped: per layer, feed-forward calls left out.
        tokens: decoded tokens, warm-up included, prompts not.
    """

    skipped: list[int] = field(default_factory=list)
    tokens: int = 0

    @property
    def skipped_share(self) -> float:
        """Of all feed-forward calls of decoded tokens."""
        return sum(self.skipped) / max(self.tokens * len(self.skipped), 1)


@contextmanager
def skip_feed_forward(
    model: nn.Module, *, threshold: float, cold_head: int = 1, cold_tail: int = 1, warm_up: int = 8
) -> Iterator[SkipReport]:
    """Within it, `model` skips feed-forward layers while it decodes token by token.

    Args:
        model: a decoder language model whose layers stand in one list, each with a feed-forward that is added to the
            residual stream.
        threshold: cosine of the stream before and after a feed-forward from which on later ones are skipped; above 1
            nothing is.
        cold_head, cold_tail: number of layers at the beginning and the end that never skip.
        warm_up: number of decoded tokens of a request that skip nothing.

    Yields:
        The report, which counts while the model runs.

    Raises:
        ValueError: if the model has no such layers, or the settings leave none to skip.
    """
    layers = decoder_layers(model)
    if cold_head < 0 or cold_tail < 0 or cold_head + cold_tail >= len(layers):
        raise ValueError(
            f"cold_head + cold_tail must leave at least one of {len(layers)} layers; got {cold_head} and {cold_tail}"
        )
    if any(isinstance(router, PreGate) for router in model.modules()):
        raise ValueError("a pre-gated model cannot skip feed-forwards: each one holds the plan of a later one")
    if warm_up < 0:
        raise ValueError(f"warm_up must be 0 or more tokens; got {warm_up}")
    report = SkipReport(skipped=[0] * len(layers))
    policy = _Policy(report, threshold, range(cold_head, len(layers) - cold_tail), warm_up)
    handles = [model.register_forward_pre_hook(policy.begin, with_kwargs=True)]
    feed_forwards = [_feed_forward(layer) for layer in layers]
    own_forwards = [feed_forward.__dict__.get("forward") for feed_forward in feed_forwards]
    try:
        for index, (layer, feed_forward) in enumerate(zip(layers, feed_forwards, strict=True)):
            feed_forward.forward = policy.around(index, feed_forward)
            contribution = getattr(layer, NORM_AFTER, feed_forward)
            handles.append(contribution.register_forward_hook(policy.note_contribution))
            handles.append(layer.register_forward_hook(policy.judge(index)))
        yield report
    finally:
        for handle in handles:
            handle.remove()
        for feed_forward, own in zip(feed_forwards, own_forwards, strict=True):
            feed_forward.__dict__.pop("forward", None)
            if own is not None:
                feed_forward.forward = own


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model of transformers: its longest list of modules that have a feed-forward.

    Raises:
        ValueError: if there is none.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    fitting = [layers for layers in lists if layers and all(_feed_forward(layer) is not None for layer in layers)]
    if not fitting:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers with a feed-forward called "
            f"{', '.join(FEED_FORWARD_NAMES)}"
        )
    return max(fitting, key=len)


def _feed_forward(layer: nn.Module) -> Any:
    return next((getattr(layer, name) for name in FEED_FORWARD_NAMES if hasattr(layer, name)), None)


class _Policy:
    """The state of one token's way through the layers, per sequence of the batch."""

    def __init__(self, report: SkipReport, threshold: float, warm_layers: range, warm_up: int) -> None:
        self.report, self.threshold, self.warm_layers, self.warm_up = report, threshold, warm_layers, warm_up
        self.num_decoded = 0
        self.is_open = False
        self.is_skipping_B: Tensor | None = None
        self.contribution: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A new token: a request begins with an empty cache or several tokens at once, and nothing is skipped then."""
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        cache = kwargs.get("past_key_values")
        is_decoding = ids is not None and ids.shape[1] == 1 and cache is not None and cache.get_seq_length() > 0
        self.num_decoded = self.num_decoded + 1 if is_decoding else 0
        self.is_open = is_decoding and self.num_decoded > self.warm_up
        self.is_skipping_B = None if not self.is_open else torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.report.tokens += len(ids) if is_decoding else 0

    def around(self, index: int, feed_forward: nn.Module) -> Callable[..., Any]:
        """The feed-forward of a layer, computed for the sequences that do not skip it."""
        forward, is_routed = feed_forward.forward, isinstance(feed_forward, RoutedLayer)

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._may_skip(index) or not self.is_skipping_B.any():
                return forward(x, *args, **kwargs)
            self.report.skipped[index] += int(self.is_skipping_B.sum())
            if self.is_skipping_B.all() and (is_routed or not (args or kwargs)):
                return (torch.zeros_like(x), args[0], []) if is_routed else torch.zeros_like(x)
            if args or kwargs:  # token-aligned arguments: compute all, keep some
                return _zeroed(forward(x, *args, **kwargs), self.is_skipping_B)
            y, kept_B = torch.zeros_like(x), ~self.is_skipping_B
            y[kept_B] = forward(x[kept_B])
            return y

        return run

    def note_contribution(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What the layer adds to the stream."""
        self.contribution = output[0] if isinstance(output, tuple) else output

    def judge(self, index: int) -> Callable[..., None]:
        """Whether later feed-forwards are skipped, from what this one did to the stream."""

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._may_skip(index):
                return
            stream = (output[0] if isinstance(output, tuple) else output).float()
            before = stream - self.contribution.float().view_as(stream)
            is_flat_B = (cosine_similarity(before, stream, dim=-1) >= self.threshold).flatten()
            self.is_skipping_B = self.is_skipping_B | is_flat_B

        return after

    def _may_skip(self, index: int) -> bool:
        return self.is_open and index in self.warm_layers


def _zeroed(output: Any, is_skipping_B: Tensor) -> Any:
    """The output, or the first of several, with the rows of skipping sequences 0."""
    y, *rest = output if isinstance(output, tuple) else (output,)
    y = y.masked_fill(is_skipping_B.view(-1, *[1] * (y.ndim - 1)), 0.0)
    return (y, *rest) if rest else y
