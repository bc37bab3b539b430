"""Floors: the fewest bytes that a training step of a split model can move between processes, part by part.

A gather of B bytes over W processes brings each of them what the others have: (W - 1) B in all; a sum that leaves each
with its part moves as much, one that leaves all with the whole twice as much. Rows of tokens go to their experts and
back, in forward and again in backward.
"""

from dataclasses import dataclass

from torch import nn

from .dispatch import ID_BYTES
from .shard import Split

WEIGHT_BYTES = 4
"""Of a combine weight: routers compute in float32."""


@dataclass(frozen=True, kw_only=True)
class StepFloor:
    """Bytes of one step, over all processes.

    Args:
        weights: parameters gathered for forward and backward.
        gradients: sums of gradients.
        tokens: rows to experts and back, and their gradients.
    """

    weights: int
    gradients: int
    tokens: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.tokens


def step_floor(model: nn.Module, split: Split, micro_batches: int, remote_rows: int) -> StepFloor:
    """The floor of a step as FSDP2 is set up here: layers are gathered twice per micro-batch, the rest once.

    Args:
        model: split, a `MoEForCausalLM` of plain parameters.
        split: how.
        micro_batches: that each process computes in the step.
        remote_rows: rows that left their process in the step, over all processes, as `Traffic` counts them.
    """
    W, data = split.layout.processes, split.layout.data
    kept = {id(parameter) for parameter in (*split.whole, *split.only)}
    banks = {id(parameter) for bank in split.experts for parameter in bank.parameters()} - kept
    of_layers = {id(parameter) for layer in model.model.layers for parameter in layer.parameters()} - kept - banks
    sizes = {id(parameter): parameter.numel() * parameter.element_size() for parameter in model.parameters()}
    layers, copied = (sum(sizes[number] for number in group) for group in (of_layers, banks))
    rest = sum(size for number, size in sizes.items() if number not in kept | banks | of_layers)
    routers = sum(parameter.numel() * parameter.element_size() for parameter in split.whole)
    K, D = model.config.num_experts_per_tok, model.config.hidden_size
    row = 4 * D * model.dtype.itemsize + K * (ID_BYTES + 2 * WEIGHT_BYTES)
    return StepFloor(
        weights=micro_batches * ((W - 1) * (2 * layers + rest) + (data - 1) * 2 * copied),
        gradients=(W - 1) * (layers + rest + 2 * routers) + (data - 1) * copied,
        tokens=remote_rows * row,
    )
