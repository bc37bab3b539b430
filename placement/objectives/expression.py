"""What users write as an objective, read once: `fanout+2*balance`, `balance<=1.1,fanout`, `balance+10*churn`."""

from collections.abc import Sequence

from routing.ground.expect import expect_name

from .objective import Objective, Term, sum_of, without
from .registry import CHURN, OBJECTIVES

GOAL_PRICE = 100.0  # a layer 1 % off its goal pays as much as one more GPU per token; untried elsewhere


def find_objective(text: str) -> Objective:
    """The objective of that name, or of an expression of names.

    Args:
        text: a key of OBJECTIVES; a weighted sum "fanout+2*balance"; goals in order of rank "balance<=1.1,fanout".
            Each part but the last is brought to its goal, whatever that costs the parts after it. A last summand
            "W*churn" belongs to the whole expression before it.

    Raises:
        ValueError: for unknown names (the message lists all) and for weights or goals that are no numbers.
    """
    if text in OBJECTIVES:
        return OBJECTIVES[text]
    base, _, last = text.rpartition("+")
    if base and last.endswith("*churn"):
        return with_churn(find_objective(base), _read_term(last).weight)
    if "," in text:
        return _ranked(text)
    return sum_of([_read_term(term) for term in text.split("+")], text)


def weighted(parts: Sequence[tuple[float, str]], name: str | None = None) -> Objective:
    """A weighted sum of named objectives: `weighted([(1, "fanout"), (2, "balance")])`.

    Args:
        parts: weights (not negative) and names. A name may carry a goal: "balance<=1.1" counts only what the fullest
            GPU is above 1.1 times the mean.
        name: of the sum; None writes the parts out.
    """
    return sum_of([_read_part(weight, part) for weight, part in parts], name)


def with_churn(objective: Objective, weight: float) -> Objective:
    """The objective plus `weight` per gigabyte that a layer moves away from `Problem.current`."""
    terms = [*objective.as_terms(), Term(weight=weight, part=CHURN)]
    return sum_of(terms, f"{objective.name}+{weight:g}*churn")


def without_churn(objective: Objective) -> Objective:
    """The objective without its churn part."""
    return without(objective, CHURN)


def _ranked(text: str) -> Objective:
    terms = [_read_part(1.0, part) for part in text.split(",")]
    for term in terms[:-1]:
        if term.goal is None:
            raise ValueError(
                f"{term.label} comes before another objective and needs a goal, for instance {term.label}<=1.1"
            )
    last = len(terms) - 1
    ranked = [Term(weight=GOAL_PRICE ** (last - rank), part=t.part, goal=t.goal) for rank, t in enumerate(terms)]
    return sum_of(ranked, text)


def _read_term(text: str) -> Term:
    factor, times, part = text.rpartition("*")
    try:
        weight = float(factor) if times else 1.0
    except ValueError:
        raise ValueError(f"the weight in {text!r} must be a number, as in 2*balance") from None
    return _read_part(weight, part)


def _read_part(weight: float, text: str) -> Term:
    name, has_goal, goal = text.partition("<=")
    part = OBJECTIVES[expect_name(name, OBJECTIVES, "objective")]
    if not has_goal:
        return Term(weight=weight, part=part)
    try:
        return Term(weight=weight, part=part, goal=float(goal))
    except ValueError:
        raise ValueError(f"the goal of {name} must be a number; got {goal!r}") from None
