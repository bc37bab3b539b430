"""One expert quantised: both of its matrices by a method, with what is known of its inputs.

Shapes: D model width, F expert width, O outputs of any matrix, C its inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ..codes.schemes import Scheme
from ..compute.gating import Gating, find_gating
from .inputs import ExpertRows
from .methods.compensation import balancing_scales, gptq, second_moment
from .methods.rounding import Rounded, hqq, least_squares, rtn
from .methods.ternary import Ternary, ternary

METHODS = ("rtn", "hqq", "gptq", "awq")
NEEDS_INPUTS = ("gptq", "awq")
FITS_ZEROS = ("hqq",)
LEAST_SHARE = 0.005
"""Share of the tokens below which an expert's inputs are too few to learn from; what GPTQModel takes, too."""
LEAST_ROWS = 16
"""Inputs below which a method that needs them says little, so that weights alone decide. Not tuned."""


@dataclass(frozen=True, eq=False)
class ExpertModule:
    """What computing an expert needs besides its matrices.

    Args:
        module: the experts module, or its skeleton.
        up_name: parameter of the first product.
        down_name: parameter of the second.
        gating: the gate as tables; None if it is something else.
    """

    module: Any
    up_name: str
    down_name: str
    gating: Gating | None

    @classmethod
    def of(cls, module: Any, up_name: str, down_name: str, width: int) -> "ExpertModule":
        """Look at the gate of an experts module whose second product has `width` inputs."""
        return cls(module, up_name, down_name, find_gating(module, width))

    @property
    def can_balance(self) -> bool:
        """Whether rows of the first matrix can be divided by what columns of the second are multiplied with."""
        return self.gating is not None and self.gating.is_gated and self.gating.linear is None

    def gate(self, out: torch.Tensor) -> torch.Tensor:
        """The inputs of the second product, from the outputs of the first."""
        apply = self.module._apply_gate if self.module.has_gate else self.module.act_fn
        return apply(out)

    def linear_rows(self, rows: int) -> slice:
        """Which rows of the first matrix are the linear part of the gate."""
        assert self.gating is not None
        return slice(1, rows, 2) if self.gating.is_interleaved else slice(rows // 2, rows)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The inputs of one expert, and what tells whether they are enough.

    Args:
        rows: inputs that were kept, and how the router weighed them.
        up_bias: what the first product adds; 0 without one.
        num_tokens: tokens of the text, 1 or more.
    """

    rows: ExpertRows
    up_bias: torch.Tensor | float
    num_tokens: int

    @property
    def is_enough(self) -> bool:
        """Whether a method may rely on them."""
        return self.rows.num_seen >= max(LEAST_ROWS, LEAST_SHARE * self.num_tokens)


@dataclass(frozen=True, eq=False)
class QuantisedExpert:
    """Both matrices, by parameter name, and the method that was used in the end."""

    rounded: Mapping[str, Rounded]
    method: str


def quantise_expert(
    about: ExpertModule,
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, Scheme],
    method: str,
    dtype: str,
    calibration: Calibration | None = None,
) -> QuantisedExpert:
    """Quantise one expert.

    Args:
        about: its module.
        weights: each matrix `[O, C]`, float32.
        schemes: what each is rounded to.
        method: one of METHODS; `gptq` and `awq` fall back to `rtn` if inputs are too few, `hqq` needs zeros.
        dtype: of the stored scales.
        calibration: the expert's inputs; `gptq` and `awq` need them.
    """
    if method in NEEDS_INPUTS:
        assert calibration is not None
        if calibration.is_enough:
            return _with_inputs(about, weights, schemes, method, dtype, calibration)
        method = "rtn"
    alone = hqq if method == "hqq" else rtn
    return QuantisedExpert({name: alone(w_OC, schemes[name], dtype) for name, w_OC in weights.items()}, method)


def _with_inputs(
    about: ExpertModule,
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, Scheme],
    method: str,
    dtype: str,
    calibration: Calibration,
) -> QuantisedExpert:
    if method == "awq":
        up_OC, down_OC = weights[about.up_name].clone(), weights[about.down_name].clone()
        up, down = schemes[about.up_name], schemes[about.down_name]
        rows = calibration.rows
        cost_N = rows.weight_N.square()
        hidden = _hidden(about, up_OC, calibration)
        moment_CC = second_moment(hidden.x_NC, cost_N)
        if about.can_balance:
            factor_C = balancing_scales(down_OC, down, dtype, moment_CC, hidden.x_NC.abs().mean(0))
            up_OC[about.linear_rows(len(up_OC))] /= factor_C[:, None]
            down_OC *= factor_C
            moment_CC = moment_CC / (factor_C[:, None] * factor_C)
        first = least_squares(up_OC, up, dtype, (cost_N[:, None] * rows.x_NC.square()).sum(0))
        second = least_squares(down_OC, down, dtype, moment_CC.diagonal())
        return QuantisedExpert({about.up_name: first, about.down_name: second}, method)
    found = _in_turn(
        about,
        weights,
        calibration,
        lambda name, w_OC, moment_CC: gptq(w_OC, schemes[name], dtype, moment_CC),
    )
    return QuantisedExpert(found, method)


def ternary_expert(
    about: ExpertModule, weights: Mapping[str, torch.Tensor], calibration: Calibration | None = None
) -> tuple[dict[str, Ternary], str]:
    """Both matrices in three values for each row, and the method: `gptq` where there are enough inputs, else `rtn`.

    Args:
        about: the expert's module.
        weights: each matrix `[O, C]`, float32.
        calibration: the expert's inputs, if there are any.
    """
    if calibration is None or not calibration.is_enough:
        return {name: ternary(w_OC) for name, w_OC in weights.items()}, "rtn"
    return _in_turn(about, weights, calibration, lambda name, w_OC, moment_CC: ternary(w_OC, moment_CC)), "gptq"


class HasWeight(Protocol):
    """A matrix that was rounded."""

    @property
    def weight_RC(self) -> torch.Tensor:
        """What it stands for."""
        ...


R = TypeVar("R", bound=HasWeight)


def _in_turn(
    about: ExpertModule,
    weights: Mapping[str, torch.Tensor],
    calibration: Calibration,
    rounded: Callable[[str, torch.Tensor, torch.Tensor], R],
) -> dict[str, R]:
    """The first matrix rounded by its inputs, then the second by what the first has become makes of them.

    Args:
        rounded: told a name, a matrix and the second moment of its inputs.
    """
    rows = calibration.rows
    # an error of an expert's output reaches the layer's output times the routing weight, and its square counts
    cost_N = rows.weight_N.square()
    first = rounded(about.up_name, weights[about.up_name], second_moment(rows.x_NC, cost_N))
    hidden = _hidden(about, first.weight_RC, calibration)
    second = rounded(about.down_name, weights[about.down_name], second_moment(hidden.x_NC, cost_N))
    return {about.up_name: first, about.down_name: second}


def _hidden(about: ExpertModule, up_OC: torch.Tensor, calibration: Calibration) -> ExpertRows:
    """The inputs of the second product."""
    return calibration.rows.through(lambda x_NC: about.gate(x_NC @ up_OC.T + calibration.up_bias))
