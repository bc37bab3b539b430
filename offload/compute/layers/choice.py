"""How our C chooses experts for a token: by a rule that was read off a feed-forward, and then tried on logits of ours.

Shapes: E experts, K experts per token.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from .operations import Answer, Questioned
from .rules import LARGEST_FIRST, LARGEST_FIRST_WIDE, SIGMOID_FIRST, SOFTMAX_FIRST, Rule, read_rule
from .structs import Choice, choose_experts

LANES = (16, 8)
"""Numbers that torch may compute side by side: those of a register of AVX-512, or of AVX2."""
TRIED_ROWS, TRIED_LOGITS = 256, 16
"""Rows of logits that a rule is compared on with torch's operations in float32, and each feed-forward with the rule. In
float32 another order of summation changes weights of every tenth row."""
TRIED_SCALES = (0.1, 1.0, 10.0, 1000.0)
"""Sizes of the logits of a trial; of the largest most probabilities are 0, and therefore equal."""

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Ids and weights, `[1, K]`."""


def choose(how: Choice, logit_1E: torch.Tensor) -> Chosen | None:
    """What our C chooses; None if it leaves the choice to torch.

    Args:
        how: the rule, as `find_choice` gives it.
        logit_1E: bfloat16, or float32 if the rule is wide; contiguous.
    """
    dtype = torch.bfloat16 if how.is_rounded else torch.float32
    expert_1K = logit_1E.new_empty(1, how.chosen, dtype=torch.int64)
    weight_1K = logit_1E.new_empty(1, how.chosen, dtype=dtype)
    addresses = (logit_1E.data_ptr(), expert_1K.data_ptr(), weight_1K.data_ptr())
    return (expert_1K, weight_1K) if choose_experts()(how, *addresses) else None


class FoundChoice(NamedTuple):
    """How a feed-forward chooses.

    Args:
        how: as C takes it.
        bias_E: of the scores that are compared, whose address C has; or None.
        answer: of the feed-forward.
    """

    how: Choice
    bias_E: torch.Tensor | None
    answer: Answer


def find_choice(block: Questioned) -> FoundChoice | None:
    """How a feed-forward chooses; None if that is not a usual way, or not torch's on this processor.

    Args:
        block: the feed-forward.
    """
    logits = list(_varied_logits(block.num_experts, TRIED_LOGITS))
    answer = block.answer(logits[0])
    if answer is None or (found := read_rule(answer)) is None:
        return None
    rule, bias_E = found
    if not rule.is_known or (bias_E is not None and not _is_read(bias_E, rule)):
        return None
    if (lanes := _lanes_of_torch(rule, bias_E is not None)) is None:
        return None
    how = as_struct(rule, lanes, bias_E)
    for logit_1E in logits:
        expected = block.answer(logit_1E)
        if expected is None or not _agrees(choose(how, expected.product.made), expected.chosen):
            return None
    return FoundChoice(how, bias_E, answer)


def as_struct(rule: Rule, lanes: int, bias_E: torch.Tensor | None) -> Choice:
    """A rule as C takes it.

    Args:
        rule: as it was read.
        lanes: numbers that torch computes side by side.
        bias_E: bfloat16 or float32, where it will stay; None for none.
    """
    named = {name: getattr(rule, name) for name, *_ in Choice._fields_ if hasattr(rule, name)}
    address, is_wide = (None, False) if bias_E is None else (bias_E.data_ptr(), bias_E.dtype == torch.float32)
    return Choice(**named, lanes=lanes, bias=address, is_bias_wide=is_wide)


def _is_read(bias_E: torch.Tensor, rule: Rule) -> bool:
    """Whether our C reads a bias."""
    is_one = bias_E.numel() == rule.experts and bias_E.is_contiguous() and bias_E.device.type == "cpu"
    return is_one and bias_E.dtype in (torch.bfloat16, torch.float32)


def _varied_logits(num_experts: int, rows: int) -> Iterator[torch.Tensor]:
    """Random logits `[1, E]` of several sizes; in half of the rows many are equal."""
    generator = torch.Generator().manual_seed(0)
    for row in range(rows):
        number, place = divmod(row, len(TRIED_SCALES))
        logit_1E = torch.randn(1, num_experts, generator=generator) * TRIED_SCALES[place]
        yield logit_1E.round() if number % 2 else logit_1E


@cache
@torch.inference_mode(False)
@torch.no_grad()
def _lanes_of_torch(rule: Rule, has_bias: bool) -> int | None:
    """The lanes with which a rule is bit-identical to torch before weights are rounded; None if there are none."""
    if rule.is_rounded and rule.rule != LARGEST_FIRST:
        return _lanes_of_torch(_in_float32(rule), has_bias)
    generator = torch.Generator().manual_seed(1)
    bias_E = torch.randn(rule.experts, generator=generator).mul_(0.1) if has_bias else None
    dtype = torch.float32 if rule.is_wide else torch.bfloat16
    logits = [logit_1E.to(dtype) for logit_1E in _varied_logits(rule.experts, TRIED_ROWS)]
    expected = [_by_torch(rule, logit_1E, bias_E) for logit_1E in logits]
    for lanes in LANES:
        how = as_struct(rule, lanes, bias_E)
        if all(_agrees(choose(how, logit_1E), known) for logit_1E, known in zip(logits, expected, strict=True)):
            return lanes
    return None


def _in_float32(rule: Rule) -> Rule:
    """The same rule with weights that are not rounded in the end."""
    return Rule(**{**vars(rule), "is_rounded": False})


def _by_torch(rule: Rule, logit_1E: torch.Tensor, bias_E: torch.Tensor | None) -> Chosen:
    """A rule as routers of transformers write it."""
    scores = logit_1E
    if rule.rule == SIGMOID_FIRST:
        scores = logit_1E.float().sigmoid()
    elif rule.rule == SOFTMAX_FIRST:
        scores = torch.nn.functional.softmax(logit_1E, dtype=torch.float, dim=-1)
    compared = scores if bias_E is None else scores + bias_E
    if rule.kept_groups < rule.groups:
        compared = _by_groups(rule, compared)
    weight_1K, expert_1K = torch.topk(compared, rule.chosen, dim=-1, sorted=rule.is_sorted)
    if rule.is_unbiased:
        weight_1K = scores.gather(1, expert_1K)
    if rule.rule in (LARGEST_FIRST, LARGEST_FIRST_WIDE):
        dtype = torch.bfloat16 if rule.rule == LARGEST_FIRST else torch.float32
        weight_1K = torch.nn.functional.softmax(weight_1K, dim=1, dtype=dtype)
    if rule.normalises:
        weight_1K = weight_1K / (weight_1K.sum(dim=-1, keepdim=True) + rule.added).clamp(min=rule.least)
    return expert_1K, weight_1K * rule.scale


def _by_groups(rule: Rule, compared_1E: torch.Tensor) -> torch.Tensor:
    """Scores with those outside the best groups masked."""
    best = compared_1E.view(1, rule.groups, -1).topk(rule.best_of_group, dim=-1)[0].sum(dim=-1)
    kept = torch.topk(best, rule.kept_groups, dim=-1, sorted=False)[1]
    is_kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
    return compared_1E.masked_fill(~is_kept.repeat_interleave(rule.experts // rule.groups, dim=-1), rule.masked)


def _agrees(found: Chosen | None, expected: Chosen) -> bool:
    if found is None:
        return False
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True))
