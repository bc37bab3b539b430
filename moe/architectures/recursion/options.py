"""Options of a mixture of recursions: those of every depth router's kind, and which of them belong to which kind."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from routing import Options, read_options

from .depth import ExpertChoiceDepth, RouterKind, TokenChoiceDepth


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceOptions(Options):
    """Each recursion picks its tokens.

    Args:
        router: of the depth: `linear` (the best published one here) or `mlp`.
        inference: outside training `threshold` is causal; `top_k` sees the whole row, so it cannot generate.
        predictor: whose logit the threshold reads: the router's `own`, or that of a `separate` one.
        alpha: scale of the gate.
        loss_weight: of the depth router's loss.
        z_weight: of the depth router's z-loss.
    """

    router: RouterKind = "linear"
    inference: Literal["threshold", "top_k"] = "threshold"
    predictor: Literal["own", "separate"] = "own"
    alpha: float = 0.1
    loss_weight: float = 1e-3
    z_weight: float = 0.0

    def build(self, width: int, recursions: int) -> ExpertChoiceDepth:
        """The depth router for J = `recursions` and D = `width`."""
        return ExpertChoiceDepth(
            width,
            recursions,
            kind=self.router,
            inference=self.inference,
            predictor=self.predictor,
            alpha=self.alpha,
            loss_weight=self.loss_weight,
            z_weight=self.z_weight,
        )


@dataclass(frozen=True, kw_only=True)
class TokenChoiceOptions(Options):
    """Each token gets its depth at once.

    Args:
        router: of the depth: `linear` or `mlp` (the best published one here).
        score: activation that turns logits into scores of depths.
        balance: a `loss`, or a selection `bias` that is moved after every step.
        alpha: scale of the gate; 0.1 with a sigmoid and 1 with a softmax if not given.
        loss_weight: of the balance loss.
        z_weight: of the depth router's z-loss.
    """

    router: RouterKind = "mlp"
    score: Literal["softmax", "sigmoid"] = "softmax"
    balance: Literal["loss", "bias"] = "loss"
    alpha: float | None = None
    loss_weight: float = 0.1
    z_weight: float = 1e-5

    def build(self, width: int, recursions: int) -> TokenChoiceDepth:
        """The depth router for J = `recursions` and D = `width`."""
        published = 1.0 if self.score == "softmax" else 0.1
        return TokenChoiceDepth(
            width,
            recursions,
            kind=self.router,
            score=self.score,
            balance=self.balance,
            alpha=published if self.alpha is None else self.alpha,
            loss_weight=self.loss_weight,
            z_weight=self.z_weight,
        )


@dataclass(frozen=True, kw_only=True)
class NoChoiceOptions(Options):
    """All tokens pass all recursions, so there is no depth router and nothing to choose."""

    def build(self, width: int, recursions: int) -> None:
        """No depth router."""


CHOICES: dict[str, type[ExpertChoiceOptions | TokenChoiceOptions | NoChoiceOptions]] = {
    "expert": ExpertChoiceOptions,
    "token": TokenChoiceOptions,
    "none": NoChoiceOptions,
}


def read_depth_options(
    choice: str, values: Mapping[str, Any]
) -> ExpertChoiceOptions | TokenChoiceOptions | NoChoiceOptions:
    """The options of one choice.

    Args:
        choice: a key of `CHOICES`.
        values: by name; None takes the default.

    Raises:
        ValueError: if an option belongs to another choice, or a value does not fit.
    """
    given = {name: value for name, value in values.items() if value is not None}
    own = {field.name for field in fields(CHOICES[choice])}
    for name in sorted(given.keys() - own):
        having = [repr(other) for other, kind in CHOICES.items() if name in {field.name for field in fields(kind)}]
        if having:
            raise ValueError(
                f"{name} is an option of choice={' or '.join(having)}; this model has choice={choice!r}: "
                "leave the option out, or change the choice"
            )
    (options,) = read_options([CHOICES[choice]], given, "option of this choice")
    return options
