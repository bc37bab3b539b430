"""What a text says of a dense model's parts: how important a hidden unit is, and which layers can be left out.

Shapes: B sequences, S positions, T tokens, D model width, F hidden units of the dense feed-forward, L layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..model.decoder import MoEForCausalLM
from .subnet import expect_dense


@torch.no_grad()
def unit_importance(model: MoEForCausalLM, token_BS: Tensor) -> Tensor:
    """float32 [L, F]: the variance of a unit's value over a text, times the squared norm of what it writes.

    A unit that hardly varies could be replaced by a constant; here it is left out, since our layers have no bias for
    that constant.

    Source: An et al. 2024 (FLAP), arXiv:2312.11983, equation 4 (WIFV), which AmoebaLLM uses.
    """
    expect_dense(model)
    found: list[Tensor] = []

    def note(experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden_TF = experts._apply_gate(linear(inputs[0], experts.gate_up_proj[0]))
        written_F = experts.down_proj[0].square().sum(dim=0)
        found.append((hidden_TF.var(dim=0) * written_F).float())

    handles = [layer.mlp.experts.register_forward_pre_hook(note) for layer in model.model.layers]
    try:
        model(token_BS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def droppable_layers(
    loss_without: Callable[[frozenset[int]], float], num_layers: int, most: int, *, num_last_kept: int = 1
) -> list[frozenset[int]]:
    """For each number of layers up to `most`, which ones to leave out, by dynamic programming.

    P(n, m), the best found choice of m of the first n layers, is the better of P(n-1, m) and P(n-1, m-1) with layer n.
    Choices are judged by the model that they leave, so at most two models are tried per pair (n, m).
    The result is the best of all where layers cost what they cost whatever else is left out, and a good one else.

    Args:
        loss_without: how bad the model is without these layers; lower is better.
        num_layers: decoder layers, more than `num_last_kept`.
        most: layers left out at most.
        num_last_kept: layers at the end that are never left out.

    Returns:
        `most + 1` choices, the first empty; equals go to the choice with higher layers kept.

    Raises:
        ValueError: if so many layers cannot be left out.

    Source: Fu et al. 2024 (AmoebaLLM), arXiv:2411.10606, section 3.2; the last layer stays, as its code has it.
    """
    free = num_layers - num_last_kept
    if not 0 <= most <= free:
        raise ValueError(f"at most {free} of {num_layers} layers can be left out; got {most}")
    losses: dict[frozenset[int], float] = {}

    def loss(choice: frozenset[int]) -> float:
        if choice not in losses:
            losses[choice] = loss_without(choice)
        return losses[choice]

    best: list[frozenset[int] | None] = [frozenset(), *[None] * most]
    for layer in range(free):
        for count in range(min(most, layer + 1), 0, -1):
            fewer, same = best[count - 1], best[count]
            assert fewer is not None
            with_it = fewer | {layer}
            best[count] = with_it if same is None or loss(with_it) < loss(same) else same
    return [choice for choice in best if choice is not None]
