"""Run a model whose experts are in memory for one layer at a time, read when that layer's turn comes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..model.decoder import MoEForCausalLM

ReadLayer = Callable[[int], Mapping[str, Tensor]]
SeeInput = Callable[[int, Tensor], None]


@contextmanager
def streamed_experts(model: MoEForCausalLM, read: ReadLayer, see: SeeInput | None = None) -> Iterator[None]:
    """Inside, a forward pass reads the experts of a layer just before they compute and forgets them after.

    Args:
        model: its experts' parameters are on the meta device.
        read: layer -> parameters of its experts module, by their names there.
        see: is told each layer's expert inputs [T, D].
    """
    handles = []
    for layer, moe_layer in enumerate(model.model.moe_layers):
        hollow = dict(moe_layer.experts.named_parameters())

        def enter(experts: nn.Module, inputs: tuple[Any, ...], layer: int = layer) -> None:
            if see is not None:
                see(layer, inputs[0])
            fill(experts, read(layer))

        def leave(experts: nn.Module, _inputs: Any, _output: Any, hollow: Mapping[str, Tensor] = hollow) -> None:
            fill(experts, hollow)

        handles += [
            moe_layer.experts.register_forward_pre_hook(enter),
            moe_layer.experts.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace parameters of a module, without copying."""
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))


@torch.no_grad()
def mean_loss(model: MoEForCausalLM, token_BS: Tensor) -> float:
    """Nats per predicted token, with logits in memory for one sequence at a time."""
    output, _ = model.model(token_BS, use_cache=False)
    return loss_of(output.x_BSD, model.lm_head, token_BS)


@torch.no_grad()
def loss_of(x_BSD: Tensor, head: nn.Module, token_BS: Tensor) -> float:
    """Mean next-token loss in nats, from final hidden states and an LM head."""
    losses = [
        cross_entropy(head(x_SD[:-1]).float(), token_S[1:]) for x_SD, token_S in zip(x_BSD, token_BS, strict=True)
    ]
    return float(torch.stack(losses).mean())
