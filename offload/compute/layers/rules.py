"""The rule by which a router chooses experts, read off the operations that it calls between its logits and the experts.

Results alone would not do. Weights may be rounded to bfloat16, and two rules that differ before that agree for
hundreds of tokens. So every operation has to be one that a rule has, and its input what the rule says.

Shapes: E experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch

from .operations import Answer, Call

SOFTMAX_FIRST, LARGEST_FIRST, SIGMOID_FIRST, LARGEST_FIRST_WIDE = range(4)
"""`enum choice_rule`."""
SCORES = {"_softmax": SOFTMAX_FIRST, "sigmoid": SIGMOID_FIRST}
MASK = ("zeros_like", "scatter_", "clone", "_to_copy", "bitwise_not")
"""What makes a mask of experts of the numbers of groups; a copy is not always needed."""
MOST_CHOSEN, LEAST_SHARE = 15, 64
"""K that our C chooses: at most 15, and more than E / 64. Torch finds fewer in another way."""


@dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighted; the fields are those of `struct choice`, which says what they mean."""

    experts: int
    rule: int
    is_wide: bool
    chosen: int = 0
    groups: int = 1
    kept_groups: int = 1
    best_of_group: int = 1
    masked: float = -inf
    normalises: bool = False
    added: float = 0.0
    least: float = -inf
    scale: float = 1.0
    is_rounded: bool = False
    is_sorted: bool = True
    is_unbiased: bool = False

    @property
    def is_known(self) -> bool:
        """Whether our C chooses in torch's order."""
        is_small = LEAST_SHARE * self.chosen > self.experts >= self.chosen <= MOST_CHOSEN
        is_kept = self.kept_groups == self.groups or LEAST_SHARE * self.kept_groups > self.groups
        return is_small and is_kept and self.experts % self.groups == 0


def read_rule(answer: Answer) -> tuple[Rule, torch.Tensor | None] | None:
    """A feed-forward's rule, and the bias of its choice; None if it does something else.

    Args:
        answer: of the feed-forward, whose logits are bfloat16 or float32.
    """
    try:
        return _Reading(answer).rule()
    except (AttributeError, IndexError, TypeError):  # an operation was called with other arguments than a rule has
        return None


@dataclass
class _Reading:
    """Calls of a choice, in their order, of which the first ones were read."""

    answer: Answer
    _left: list[Call] = field(init=False)

    def __post_init__(self) -> None:
        self._left = list(self.answer.choice)

    def rule(self) -> tuple[Rule, torch.Tensor | None] | None:
        logits = self.answer.product.made
        if (found := self._scores(logits)) is None:
            return None
        rule, scores = found
        compared, bias = self._biased(scores)
        if (masked := self._groups(rule, compared)) is None:
            return None
        rule, compared = masked
        if (chosen := self._take(["topk"], compared)) is None:
            return None
        weight_1K, expert_1K = chosen.made
        rule = replace(rule, chosen=chosen.args[1], is_sorted=_sorts(chosen))
        if (gathered := self._take(["gather"], scores)) is not None:
            if not _is_same(gathered.args[2], expert_1K):
                return None
            rule, weight_1K = replace(rule, is_unbiased=True), gathered.made
        weighted = self._weights(rule, weight_1K)
        if weighted is None or self._left or not _is_same(expert_1K, self.answer.given[1]):
            return None
        return weighted, bias

    def _biased(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is compared, and what was added for that, as it was before it was converted; None if nothing was."""
        is_copy = self._is_next("_to_copy") and self._left[0].args[0].numel() == scores.numel()
        copied = self._left.pop(0) if is_copy and not _is_same(self._left[0].args[0], scores) else None
        if (added := self._take(["add"], scores)) is None:
            return scores, None
        bias: torch.Tensor = added.args[1]
        return added.made, copied.args[0] if copied is not None and _is_same(copied.made, bias) else bias

    def _scores(self, logits: torch.Tensor) -> tuple[Rule, torch.Tensor] | None:
        """The scores of logits, `[1, E]`; logits themselves if the largest of those are chosen."""
        rule = Rule(logits.shape[-1], LARGEST_FIRST, logits.dtype == torch.float32)
        if self._is_next("topk"):
            return rule, logits
        wide = logits if rule.is_wide else self._made(["_to_copy"], logits)
        if self._is_next("topk") and wide is not None:
            return rule, wide
        if wide is None or wide.dtype != torch.float32 or (scores := self._take(list(SCORES), wide)) is None:
            return None
        return replace(rule, rule=SCORES[scores.name]), scores.made

    def _groups(self, rule: Rule, compared: torch.Tensor) -> tuple[Rule, torch.Tensor] | None:
        """With the experts outside the best groups masked, where a rule has groups."""
        if not self._left or self._left[0].name not in ("topk", "max") or self._left[0].args[0].dim() != 3:
            return rule, compared
        best = self._take(["topk", "max"], compared)
        if best is None:
            return None
        groups, values = best.args[0].shape[1], best.made[0]
        best_of_group = 1 if best.name == "max" else best.args[1]
        added = values if best.name == "max" else self._made(["sum"], values)
        if added is None or best_of_group > 2 or (kept := self._take(["topk"], added)) is None:
            return None
        made: list[Call] = []
        while self._left and self._left[0].name in MASK:
            made.append(self._left.pop(0))
        named = [call.name for call in made if call.name != "clone"]
        if named != [name for name in MASK if name != "clone"] or not _is_same(made[1].args[2], kept.made[1]):
            return None
        masked = self._take(["masked_fill"], compared)
        if masked is None or not _is_same(masked.args[1], made[-1].made):
            return None
        found = replace(rule, groups=groups, kept_groups=kept.args[1], best_of_group=best_of_group)
        return replace(found, masked=float(masked.args[2])), masked.made

    def _weights(self, rule: Rule, weight_1K: torch.Tensor) -> Rule | None:
        """What becomes of the chosen scores; None if those are not what the experts are given."""
        if rule.rule == LARGEST_FIRST:
            wide = self._made(["_to_copy"], weight_1K)
            made = self._made(["_softmax"], weight_1K if wide is None else wide)
            if made is None:
                return None
            rule, weight_1K = replace(rule, rule=_softmax_of(made)), made
        if (total := self._made(["sum"], weight_1K)) is not None:
            if (added := self._take(["add"], total)) is not None:
                rule, total = replace(rule, added=_number(added.args[1])), added.made
            if (least := self._take(["clamp"], total)) is not None:
                rule, total = replace(rule, least=_number(least.args[1])), least.made
            divided = self._take(["div", "div_"], weight_1K)
            if divided is None or not _is_same(divided.args[1], total):
                return None
            rule, weight_1K = replace(rule, normalises=True), divided.made
        if (scaled := self._take(["mul", "mul_"], weight_1K)) is not None:
            rule, weight_1K = replace(rule, scale=_number(scaled.args[1])), scaled.made
        if weight_1K.dtype == torch.float32 and (rounded := self._made(["_to_copy"], weight_1K)) is not None:
            weight_1K = rounded
        is_given = _is_same(weight_1K, self.answer.given[2]) and weight_1K.dtype in (torch.bfloat16, torch.float32)
        return replace(rule, is_rounded=weight_1K.dtype == torch.bfloat16) if is_given else None

    def _take(self, names: Sequence[str], of: torch.Tensor) -> Call | None:
        """The next call, if it has one of these names, and reads this first."""
        is_meant = self._left and self._left[0].name in names and _is_same(self._left[0].args[0], of)
        return self._left.pop(0) if is_meant else None

    def _made(self, names: Sequence[str], of: torch.Tensor) -> torch.Tensor | None:
        """What the next call made, as for `_take`."""
        call = self._take(names, of)
        return None if call is None else call.made

    def _is_next(self, name: str) -> bool:
        return bool(self._left) and self._left[0].name == name


def _is_same(one: Any, other: Any) -> bool:
    """Whether numbers lie where others do; all that were made are kept, so no memory was used twice."""
    return isinstance(one, torch.Tensor) and one.data_ptr() == other.data_ptr()


def _softmax_of(made_1K: torch.Tensor) -> int:
    """The rule of a softmax over the largest logits."""
    return LARGEST_FIRST if made_1K.dtype == torch.bfloat16 else LARGEST_FIRST_WIDE


def _sorts(topk: Call) -> bool:
    """Whether a `topk` sorts: its fifth argument, if it is given."""
    return bool(topk.args[4]) if len(topk.args) > 4 else True


def _number(value: Any) -> float:
    """An argument that has to be a number, which nobody can change later."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"expected a number; got a tensor of shape {tuple(value.shape)}")
    return float(value)
