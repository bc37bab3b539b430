"""What becomes of the sum of a token's routed experts: scaled, with a shared expert, which may have a gate of its own.

The form is read off the operations that a feed-forward calls after its experts; a trial compares its result.

Shapes: D model width, F width of the shared expert.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...formats.resident.linears import PLAIN_LINEARS
from ...formats.resident.stored_weight import kernel_matrix
from ..fused_experts import matrices_struct
from ..gating import find_gating
from ..matvec import Matvecs
from ..orders import ExpertWeights, GatingTables, Order
from .operations import Answer, Call, Questioned
from .structs import EndingTerms, end_block, siblings_struct

CASTS = "_to_copy"
"""To float32 for a sum, and back: such a sum is bit-identical to one in bfloat16."""
TRIED_SCALES = (1.0, 0.1, 30.0)
"""Sizes of the hidden numbers of a trial."""


class Ending:
    """What our C does with the sum of a token's routed experts.

    Args:
        terms: as C takes them; None if the sum stays as it is.
        weights: module and name of each weight that is read.
        gate: the matrix of the shared expert's gate, `[1, D]`, where torch multiplies with it; or None.
        keeps: what addresses point to.
    """

    def __init__(
        self,
        terms: EndingTerms | None = None,
        weights: Sequence[tuple[nn.Module, str]] = (),
        gate: torch.Tensor | None = None,
        keeps: Any = None,
    ) -> None:
        self.terms, self.weights, self._gate, self._keeps = terms, weights, gate, keeps

    def of(self, x_1D: torch.Tensor) -> "Ending":
        """The same for one token, with what torch has to compute of it."""
        if self._gate is None:
            return self
        logit_11 = nn.functional.linear(x_1D, self._gate)
        terms = EndingTerms.from_buffer_copy(self.terms)
        terms.gate_logit = logit_11.data_ptr()
        return Ending(terms, keeps=(logit_11, self))

    def finish(self, made_1D: torch.Tensor, x: int, added_to: int | None, out_1D: torch.Tensor) -> None:
        """Write what the feed-forward gives.

        Args:
            made_1D: the sum of the routed experts.
            x: address of the token's hidden numbers.
            added_to: address of D numbers that the result is added to; or None.
            out_1D: contiguous; written.
        """
        out_1D.copy_(made_1D.view(out_1D.shape))
        end_block()(self.terms, x, out_1D.numel(), added_to, out_1D.data_ptr())


def find_ending(block: nn.Module, questioned: Questioned, answer: Answer, matvecs: Matvecs) -> Ending | None:
    """What a feed-forward does after its experts; None if it is something else, or not bit-identical to our C.

    Args:
        block: the feed-forward.
        questioned: the same with other modules' results given.
        answer: of that.
        matvecs: chooses orders of summation.
    """
    if (read := _read(questioned, answer)) is None:
        return None
    scale, names = read
    if not names and scale == 1:
        is_all = not answer.after and answer.result.data_ptr() == questioned.routed_1D.data_ptr()
        return Ending() if is_all else None
    if (found := _terms(block, scale, names, matvecs)) is None:
        return None
    return found if _agrees(found, questioned) else None


def _terms(block: nn.Module, scale: float, names: Sequence[str], matvecs: Matvecs) -> Ending | None:
    """An ending as C takes it, with a shared expert and its gate where these are named; None if it does not."""
    terms, weights, gate_1D = EndingTerms(scale=scale), list[tuple[nn.Module, str]](), None
    keeps: list[Any] = []
    if names:
        if (shared := _shared_terms(block.get_submodule(names[0]), matvecs)) is None:
            return None
        keeps.append(shared)
        terms.has_shared, terms.order, terms.up_block, terms.down_block, terms.shared, terms.gating = shared[0]
        weights += shared[1]
    if len(names) > 1:
        linear: Any = block.get_submodule(names[1])
        if type(linear) not in PLAIN_LINEARS or linear.bias is not None:
            return None
        weights.append((linear, "weight"))
        if (order := _order([linear.weight], matvecs)) is None:
            gate_1D = linear.weight
        else:
            gate = siblings_struct(order, [linear.weight], [None])
            terms.gate = gate
            keeps.append(gate)  # which a field of a struct does not
    return Ending(terms, weights, gate_1D, keeps)


def _read(questioned: Questioned, answer: Answer) -> tuple[float, list[str]] | None:
    """What the routed sum is multiplied by, and names of the shared expert and its gate, those that there are."""
    calls = [call for call in answer.after if call.name != CASTS]
    narrow = [name for name in questioned.others if questioned.made(name).shape[1] == 1]
    names = [name for name in questioned.others if name not in narrow] + narrow
    if len(answer.shared) != len(names) or len(narrow) > 1 or len(names) > 2:
        return None
    if len(narrow) == len(names) == 1:
        return None
    expected = ["sigmoid", "mul"] * len(narrow) + ["add"] * bool(names)
    scaled = [call for call in calls if _scales(call, questioned.routed_1D)]
    others = sorted(call.name.rstrip("_") for call in calls if call not in scaled)
    if others != sorted(expected) or len(scaled) > 1:
        return None
    return (float(scaled[0].args[1]) if scaled else 1.0), names


def _scales(call: Call, routed_1D: torch.Tensor) -> bool:
    """Whether a call multiplies the routed sum by a number."""
    is_product = call.name in ("mul", "mul_") and not isinstance(call.args[1], torch.Tensor)
    return is_product and call.args[0].data_ptr() == routed_1D.data_ptr()


def _shared_terms(mlp: Any, matvecs: Matvecs) -> tuple[tuple[Any, ...], list[tuple[nn.Module, str]]] | None:
    """A shared expert as C takes it, and its weights; None if it is no MLP of the usual names without biases."""
    linears = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    has_gate, activation = linears[0] is not None, getattr(mlp, "act_fn", None)
    *ups, down = linears if has_gate else linears[1:]
    if activation is None or any(type(each) not in PLAIN_LINEARS or each.bias is not None for each in (*ups, down)):
        return None
    of_ups, of_down = (_order([each.weight for each in group], matvecs) for group in (ups, [down]))
    if of_ups is None or of_down is None or of_ups.number != of_down.number:
        return None
    gate = SimpleNamespace(has_gate=has_gate, act_fn=activation, _apply_gate=lambda rows: _gated(activation, rows))
    if (gating := find_gating(gate, down.in_features)) is None:
        return None
    tables = GatingTables(gating.gate.data_ptr(), None, has_gate, False)
    matrices = [matrices_struct([kernel_matrix(each.weight)], 0, each.out_features) for each in (ups[0], ups[-1], down)]
    experts = ExpertWeights(*matrices, None, None)
    tables.keeps, experts.keeps = gating, matrices
    terms = (True, of_ups.number, of_ups.block, of_down.block, experts, tables)
    return terms, [(each, "weight") for each in (*ups, down)]


def _gated(activation: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, linear = rows.chunk(2, dim=-1)
    gated: torch.Tensor = activation(gate) * linear
    return gated


def _order(weights_FD: Sequence[torch.Tensor], matvecs: Matvecs) -> Order | None:
    return matvecs.common_order(weights_FD, [None] * len(weights_FD))


def _agrees(ending: Ending, questioned: Questioned) -> bool:
    """Whether our C makes of a token and its routed experts what the feed-forward makes, bit by bit."""
    for scale in TRIED_SCALES:
        x_11D, routed_1D = questioned.x_11D * scale, questioned.routed_1D
        expected, found_1D = questioned.ended(x_11D), torch.empty_like(routed_1D)
        ending.of(x_11D[0]).finish(routed_1D, x_11D.data_ptr(), None, found_1D)
        if expected is None or not torch.equal(expected.view(1, -1), found_1D):
            return False
    return True
