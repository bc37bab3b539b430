"""The contract of every router: its sizes, and what it is asked.

Shapes: T tokens, D model width, R = E + Z routable experts (FFN and zero-compute).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from .assignment import Routing
from .context import Carry, RoutingContext
from .stats import RouterStats


@runtime_checkable
class Router(Protocol):
    """One per MoE layer; may hold a reference to a core that all layers share.

    `is_causal` says whether, outside training, a token's routing depends on earlier tokens only, so that the model can
    generate.
    """

    is_causal: bool

    def flops(self) -> float:
        """Operations of one token in one call: two per entry of every matrix that it is multiplied with."""
        ...

    def begin(self, context: RoutingContext) -> Carry:
        """The carry that enters the first MoE layer of a forward pass; only layer 0's router is asked."""
        ...

    def __call__(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        """Route the normed inputs of this layer's experts."""
        ...

    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """After an optimiser step, with its counts and valid tokens over all micro-batches and ranks; no gradient."""
        ...

    def notes(self) -> list[Tensor]:
        """What `post_step` reads besides its arguments: tensors of the step's last micro-batch, to be set in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class RouterSizes:
    """The sizes that every router is built from.

    Args:
        width: D, at least 1.
        num_experts: E, at least 1.
        top_k: K, 1..E + Z.
        num_layers: L, MoE layers, at least 1.
        zero_compute: kinds of the Z zero-compute experts, in the order of their ids.
        vocab_size: V, for routers that hash token ids.
        first_state_layer: the first layer of the key/value cache that holds no keys; MoE layer l's router keeps what it
            must know of a sequence in layer `first_state_layer + l`.

    Raises:
        ValueError: if a size is not positive or K exceeds E + Z.
    """

    width: int
    num_experts: int
    top_k: int
    num_layers: int
    zero_compute: tuple[str, ...] = ()
    vocab_size: int | None = None
    first_state_layer: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "num_experts", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 1 <= self.top_k <= self.num_routable:
            raise ValueError(f"top_k must lie in 1..{self.num_routable} (E + Z); got {self.top_k}")

    @property
    def num_zero_compute(self) -> int:
        """Z."""
        return len(self.zero_compute)

    @property
    def num_routable(self) -> int:
        """R = E + Z."""
        return self.num_experts + self.num_zero_compute
