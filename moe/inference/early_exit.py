"""Early exit by the likeness of layers: a token leaves the decoder once a layer hardly turned its stream.

After each layer the cosine of the stream before and after is compared with a threshold; a sequence that reaches it has
left, and later layers keep only the keys and values of its last stream, so that tokens after it find them.

Source: Tang et al. 2022 (MuE), arXiv:2211.11152, section 3: exit by saturation, states copied to the layers above.

Shapes: B sequences, S positions, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from routing import Carry, RouterStats

from ..layers.stack import Stack, StackInputs, StackOutput
from ..model.decoder import MoEForCausalLM
from ..model.decoder_layer import DecoderLayer


@dataclass(kw_only=True, eq=False)
class ExitReport:
    """Where decoded tokens left.

    Args:
        exits: per layer, tokens that left after it; the last layer's are those that passed all.
    """

    exits: list[int] = field(default_factory=list)

    @property
    def mean_layers(self) -> float:
        """Layers that a decoded token passed on average; 0 before there was one."""
        passed = sum((layer + 1) * count for layer, count in enumerate(self.exits))
        return passed / max(sum(self.exits), 1)


@contextmanager
def early_exit(model: MoEForCausalLM, *, threshold: float, least_layers: int = 1) -> Iterator[ExitReport]:
    """Within it, `model` may stop after `least_layers` layers while it decodes token by token; prompts pass all layers.

    Args:
        model: one of ours, of an architecture with plain decoder layers in a row.
        threshold: cosine of the stream before and after a layer from which on a sequence leaves; above 1 none does.
        least_layers: layers that every token passes, at least 1.

    Yields:
        The report, which counts while the model runs.

    Raises:
        ValueError: if the model runs its layers in a way of its own, or the layers are too few.
    """
    stack, layers = model.model.stack, model.model.layers
    if type(stack) is not Stack or not all(type(layer) is DecoderLayer for layer in layers):
        raise ValueError(
            f"early exit needs plain decoder layers in a row; the architecture {model.config.architecture!r} has others"
        )
    if not 1 <= least_layers <= len(layers):
        raise ValueError(f"least_layers must lie in 1..{len(layers)}, the layers of the model; got {least_layers}")
    if any(hasattr(router, "pre_gate") for router in model.model.routers):
        raise ValueError("a pre-gated model cannot leave early: each layer holds the plan of a later one")
    report = ExitReport(exits=[0] * len(layers))
    model.model.stack = _ExitingStack(report, threshold, least_layers)
    try:
        yield report
    finally:
        model.model.stack = stack


class _ExitingStack(Stack):
    def __init__(self, report: ExitReport, threshold: float, least_layers: int) -> None:
        super().__init__()
        self.report, self.threshold, self.least_layers = report, threshold, least_layers

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        if x_BSD.shape[1] > 1 or inputs.cache is None:
            return super().forward(layers, x_BSD, carry, inputs)
        stats: list[RouterStats] = []
        has_left_B = x_BSD.new_zeros(len(x_BSD)).bool()
        for number, layer in enumerate(layers):
            if has_left_B.all():
                _remember(layer, x_BSD, inputs)
                continue
            y_BSD, carry, layer_stats = layer(x_BSD, carry, inputs)
            stats.extend(layer_stats)
            # those that have left keep their stream: the layer computed them for their keys and values only
            y_BSD = y_BSD.where(~has_left_B[:, None, None], x_BSD)
            is_last = number == len(layers) - 1
            is_like_B = cosine_similarity(x_BSD.float(), y_BSD.float(), dim=-1)[:, 0] >= self.threshold
            leaves_B = ~has_left_B & (is_like_B | is_last) & (number + 1 >= self.least_layers)
            self.report.exits[number] += int(leaves_B.sum())
            has_left_B, x_BSD = has_left_B | leaves_B, y_BSD
        return StackOutput(x_BSD=x_BSD, router_stats=stats)


def _remember(layer: Any, x_BSD: Tensor, inputs: StackInputs) -> None:
    """Keys and values of a layer that is not computed."""
    layer.self_attn.keys_values(layer.input_layernorm(x_BSD), inputs.angles, inputs.cache)
