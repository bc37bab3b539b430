"""The unit in which activations are kept, spilled or computed again: one micro-batch in one decoder layer."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Choice = Literal["kept", "spilled", "recomputed"]
Place = tuple[int, int]
"""(decoder layer, micro-batch)."""


@dataclass(eq=False)
class Unit:
    """A micro-batch on its way through a decoder layer.

    Args:
        place: which.
        choice: what becomes of its activations.
        num_inputs: elements of the hidden state that goes into the layer.
        outputs: of its experts modules, in their order, with the ids that they were asked for.
        elsewhere_s: seconds that it waited for other passes and for experts.
        is_rerun: whether it is computed again.
    """

    place: Place
    choice: Choice
    num_inputs: int
    outputs: list[Any] = field(default_factory=list)
    elsewhere_s: float = 0.0
    is_rerun: bool = False


UNIT: ContextVar[Unit | None] = ContextVar("expertier_unit", default=None)
"""The unit that this thread computes; None between decoder layers."""
