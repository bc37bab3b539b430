"""ExpertWeights: everything that defines a layer's experts, as the kernels see it.

Shapes: E experts, C slots (C = E unless `slot_E` is given), O = 2F up outputs (F without a gate), D model width,
F expert width.
"""

from dataclasses import dataclass, field

from torch import Tensor

from .activation import Activation
from .quantise import QuantisedWeight


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of one layer's experts, in slots.

    Args:
        up: gate and up projection seen as [C, O, D]; pass a transposed view for checkpoints that store [C, D, O].
        down: down projection seen as [C, D, F].
        up_bias: [C, O] or None, outputs in the order of `up`.
        down_bias: [C, D] or None.
        activation: the function between the projections.
        is_halves: whether all gates lie before all ups among the outputs of `up`; else gates and ups alternate.
        slot_E: int32 slot of each expert, -1 for experts that are not there and contribute nothing; None when
            slots are experts.

    Raises:
        ValueError: if shapes do not fit together.
    """

    up: Tensor | QuantisedWeight
    down: Tensor | QuantisedWeight
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Activation = field(default_factory=Activation)
    is_halves: bool = True
    slot_E: Tensor | None = None

    def __post_init__(self) -> None:
        slots, outputs, width = self.up.shape
        features = outputs // (2 if self.activation.gated else 1)
        if tuple(self.down.shape) != (slots, width, features):
            raise ValueError(
                f"the down projection must be [C, D, F] = {[slots, width, features]} beside an up projection of "
                f"{[slots, outputs, width]}; got {list(self.down.shape)}; pass transposed views of transposed weights"
            )
        if isinstance(self.up, QuantisedWeight) != isinstance(self.down, QuantisedWeight):
            raise ValueError("both projections must be quantised, or neither")

    @property
    def num_slots(self) -> int:
        """C."""
        return self.up.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.num_slots if self.slot_E is None else self.slot_E.shape[0]

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.up.shape[1]

    @property
    def gates_first(self) -> bool:
        """Whether there are gates and they lie before the ups, so that kernels visit outputs in another order."""
        return self.is_halves and self.activation.gated

    @property
    def width(self) -> int:
        """D."""
        return self.up.shape[2]

    @property
    def num_features(self) -> int:
        """F."""
        return self.down.shape[2]
