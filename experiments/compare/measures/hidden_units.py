"""How sparse experts' hidden units are, and how well single units stand for single bytes.

Shapes: T tokens, K slots, E experts, D model width, F hidden units (of one expert, or of all side by
side), V bytes (the vocabulary).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from moe import MoEForCausalLM

# a token that occurs less often says nothing of a unit; thresholds cover 0 to 0.9; bounds seconds per run. Not tuned
LEAST_OCCURRENCES = 20
THRESHOLDS = tuple(step / 10 for step in range(10))
MOST_TOKENS = 4096


@torch.no_grad()
def hidden_metrics(model: MoEForCausalLM, token_BS: Tensor) -> dict[str, float]:
    """Sparsity and coverage on a text, mean over the calls of plain matrices as experts that all tokens take part in.

    Args:
        model: in evaluation mode.
        token_BS: int64; at most `MOST_TOKENS` tokens are read.

    Returns:
        `active_hidden`: mean share of a visited expert's hidden units that are not exactly zero.
        `active_units`: mean number of such units per token.
        `byte_coverage`: see `coverage`. All three NaN if there is no such call.
    """
    token_BS = token_BS[: max(1, MOST_TOKENS // token_BS.shape[1])]
    with _expert_inputs(model) as seen:
        model(token_BS, use_cache=False)
    found = [_layer_metrics(*call, token_BS.flatten()) for call in seen if len(call[1]) == token_BS.numel()]
    names = ("active_hidden", "active_units", "byte_coverage")
    if not found:
        return dict.fromkeys(names, float("nan"))
    return {name: sum(layer[name] for layer in found) / len(found) for name in names}


def coverage(unit_TF: Tensor, token_T: Tensor, num_tokens: int) -> float:
    """How well the best single unit tells each token id: its F1, best over units and thresholds, mean over ids.

    A unit says "it is this id" where it exceeds a share of its own largest value. Ids that occur fewer than
    `LEAST_OCCURRENCES` times are left out. 1 means every id has a unit of its own.

    Source: Karvonen et al. 2024, arXiv:2408.00113, section 3.2 (coverage of board states, there for chess).
    """
    is_id_TV = one_hot(token_T, num_tokens).to(unit_TF.dtype)
    count_V = is_id_TV.sum(dim=0)
    is_id_TV, count_V = is_id_TV[:, count_V >= LEAST_OCCURRENCES], count_V[count_V >= LEAST_OCCURRENCES]
    if not len(count_V):
        return float("nan")
    best_V = torch.zeros_like(count_V)
    largest_F = unit_TF.amax(dim=0)
    for threshold in THRESHOLDS:
        says_TF = (unit_TF > threshold * largest_F).to(unit_TF.dtype)
        f1_FV = 2 * (says_TF.T @ is_id_TV) / (says_TF.sum(dim=0)[:, None] + count_V)
        best_V = torch.maximum(best_V, f1_FV.amax(dim=0))
    return float(best_V.mean())


def hidden_units(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
    """float32 [T, E, F]: hidden values of the experts that each token visits; 0 for the others."""
    weight = experts.up_proj if hasattr(experts, "up_proj") else experts.gate_up_proj
    E, F = weight.shape[0], experts.down_proj.shape[-1]
    hidden_TEF = torch.zeros(len(x_TD), E, F)
    for expert in range(E):
        token_id = (expert_TK == expert).any(dim=-1).nonzero()[:, 0]
        rows = linear(x_TD[token_id], weight[expert])
        hidden = experts.act_fn(rows) if hasattr(experts, "up_proj") else experts._apply_gate(rows)
        hidden_TEF[token_id, expert] = hidden.float()
    return hidden_TEF


def _layer_metrics(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, token_T: Tensor) -> dict[str, float]:
    hidden_TEF = hidden_units(experts, x_TD, expert_TK)
    num_active = float((hidden_TEF != 0).sum())
    num_visits = float((expert_TK < hidden_TEF.shape[1]).sum())
    return {
        "active_hidden": num_active / max(num_visits * hidden_TEF.shape[2], 1.0),
        "active_units": num_active / len(x_TD),
        "byte_coverage": coverage(hidden_TEF.flatten(1), token_T, int(token_T.max()) + 1),
    }


@contextmanager
def _expert_inputs(model: MoEForCausalLM) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Collects, per MoE layer whose experts read the token itself, the experts module and what it was given."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(experts: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((experts, inputs[0], inputs[1]))

    handles = [
        layer.experts.register_forward_pre_hook(note)
        for layer in model.model.moe_layers
        if hasattr(layer, "experts") and _reads_token(layer.experts, model.config.hidden_size)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _reads_token(experts: nn.Module, width: int) -> bool:
    weight = getattr(experts, "up_proj", getattr(experts, "gate_up_proj", None))
    return isinstance(weight, Tensor) and weight.ndim == 3 and weight.shape[-1] == width
