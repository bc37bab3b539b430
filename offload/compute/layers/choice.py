"""How a router chooses experts for a token: read off the operations that it calls, then tried on logits of ours.

Results alone would not do. Weights are rounded to bfloat16, and two rules that differ before that agree for hundreds of
tokens.

Shapes: E experts, K experts per token, D model width.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..linears import TokenWeight
from .structs import Choice, choose_experts

SOFTMAX_FIRST, LARGEST_FIRST = range(2)
"""`enum choice_rule`: experts of the largest probabilities; or of the largest logits, and a softmax over those."""
RULES = {
    ("_to_copy", "_softmax", "topk"): (SOFTMAX_FIRST, False),
    ("_to_copy", "_softmax", "topk", "sum", "div_"): (SOFTMAX_FIRST, True),
    ("_to_copy", "_softmax", "topk", "sum", "div"): (SOFTMAX_FIRST, True),
    ("topk", "_softmax"): (LARGEST_FIRST, False),
}
"""What a router calls with its logits, and the rule that this is, and whether weights are divided by their sum."""
ROUNDING = "_to_copy"
"""What routers call in the end that give weights in bfloat16."""
MOST_CHOSEN, LEAST_SHARE = 15, 64
"""K that our C chooses: at most 15, and more than E / 64. Torch finds fewer in another way."""
LANES = (16, 8)
"""Numbers that torch's softmax may add side by side: those of a register of AVX-512, or of AVX2."""
TRIED_ROWS, TRIED_LOGITS = 256, 16
"""Rows of logits that a rule is compared on with torch's operations in float32, and each router with the rule. In
float32 another order of summation changes weights of every tenth row."""
TRIED_SCALES = (0.1, 1.0, 10.0, 1000.0)
"""Sizes of the logits of a trial; of the largest most probabilities are 0, and therefore equal."""

VIEWS = frozenset({"view", "_unsafe_view", "alias", "detach", "squeeze", "unsqueeze", "slice", "select"})
"""Operations that compute nothing."""

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Ids and weights, `[1, K]`."""


class Operations(TorchDispatchMode):
    """Within, the names of torch's operations are noted, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def choose(how: Choice, logit_1E: torch.Tensor) -> Chosen | None:
    """What our C chooses; None if it leaves the choice to torch.

    Args:
        how: the rule, as `find_choice` gives it.
        logit_1E: bfloat16, contiguous.
    """
    dtype = torch.bfloat16 if how.is_rounded else torch.float32
    expert_1K = logit_1E.new_empty(1, how.chosen, dtype=torch.int64)
    weight_1K = logit_1E.new_empty(1, how.chosen, dtype=dtype)
    addresses = (logit_1E.data_ptr(), expert_1K.data_ptr(), weight_1K.data_ptr())
    return (expert_1K, weight_1K) if choose_experts()(how, *addresses) else None


@torch.inference_mode(False)  # within it, operations are not called by the names of what they are made of
@torch.no_grad()
def find_choice(router: Any) -> Choice | None:
    """The rule by which a router chooses; None if it is not a usual one, or not torch's on this processor.

    Args:
        router: a module whose weight is a `TokenWeight`, which gives logits, weights and ids of tokens `[1, D]`.
    """
    logits = list(_varied_logits(len(router.weight), TRIED_LOGITS))
    x_1D = logits[0].new_zeros(1, router.weight.shape[1])
    with Operations() as called:
        first = _asked(router, x_1D, logits[0])
    if first is None:
        return None
    (expert_1K, weight_1K), num_experts = first, len(router.weight)
    top_k, is_rounded = expert_1K.shape[1], weight_1K.dtype == torch.bfloat16
    named = tuple(called.names)
    rule = RULES.get(named[:-1] if is_rounded and named[-1:] == (ROUNDING,) else named)
    if rule is None or not LEAST_SHARE * top_k > num_experts >= top_k <= MOST_CHOSEN:
        return None
    lanes = _lanes_of_torch(num_experts, top_k, *rule)
    how = Choice(num_experts, top_k, *rule, is_rounded, lanes or 0)
    agrees = lanes is not None and all(_agrees(choose(how, each), _asked(router, x_1D, each)) for each in logits)
    return how if agrees else None


def _asked(router: Any, x_1D: torch.Tensor, logit_1E: torch.Tensor) -> Chosen | None:
    """What a router makes of these logits; None if it does not take a token, or makes logits of its own."""
    weight: TokenWeight = router.weight
    try:
        with weight.known(x_1D, logit_1E):
            _, weight_1K, expert_1K = router(x_1D)
        is_usual = expert_1K.dtype == torch.int64 and expert_1K.shape == weight_1K.shape == (1, expert_1K.shape[-1])
    except Exception:  # of a module that is something else, which fails in its own way
        return None
    return (expert_1K, weight_1K) if is_usual and weight_1K.dtype in (torch.bfloat16, torch.float32) else None


def _varied_logits(num_experts: int, rows: int) -> Iterator[torch.Tensor]:
    """Random logits `[1, E]` of several sizes; in half of the rows many are equal."""
    generator = torch.Generator().manual_seed(0)
    for row in range(rows):
        number, place = divmod(row, len(TRIED_SCALES))
        logit_1E = torch.randn(1, num_experts, generator=generator) * TRIED_SCALES[place]
        yield (logit_1E.round() if number % 2 else logit_1E).bfloat16()


@cache
def _lanes_of_torch(num_experts: int, top_k: int, rule: int, normalises: bool) -> int | None:
    """The lanes with which a rule is bit-identical to torch before weights are rounded; None if there are none."""
    logits = list(_varied_logits(num_experts, TRIED_ROWS))
    is_rounded = rule == LARGEST_FIRST
    expected = [_by_torch(logit_1E, top_k, rule, normalises) for logit_1E in logits]
    for lanes in LANES:
        how = Choice(num_experts, top_k, rule, normalises, is_rounded, lanes)
        if all(_agrees(choose(how, logit_1E), known) for logit_1E, known in zip(logits, expected, strict=True)):
            return lanes
    return None


def _by_torch(logit_1E: torch.Tensor, top_k: int, rule: int, normalises: bool) -> Chosen:
    """A rule as routers of transformers write it."""
    if rule == LARGEST_FIRST:
        logit_1K, expert_1K = torch.topk(logit_1E, top_k, dim=-1)
        return expert_1K, torch.nn.functional.softmax(logit_1K, dim=1, dtype=logit_1K.dtype)
    weight_1K, expert_1K = torch.topk(torch.nn.functional.softmax(logit_1E, dtype=torch.float, dim=-1), top_k, dim=-1)
    return expert_1K, weight_1K / weight_1K.sum(dim=-1, keepdim=True) if normalises else weight_1K


def _agrees(found: Chosen | None, expected: Chosen | None) -> bool:
    if found is None or expected is None:
        return False
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True))
