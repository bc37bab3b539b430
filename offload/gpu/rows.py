"""What experts in GPU slots compute: our kernels where they know the module, otherwise one product after the other.

Both give bits that depend neither on the order in which experts come nor on the slots they lie in.

Shapes: T tokens, K experts per token, N = T * K routed rows, n rows of one expert, E experts, C slots, D model width.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..checkpoint.experts import weight_names
from .slots import GpuSlots, SlotMap

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class KernelExperts:
    """A layer whose experts our Triton kernels compute where they lie.

    Args:
        module: the experts module, for its flags and activation.
        num_experts: E, whether or not an expert has a slot.
    """

    needs_ids = False
    """Rows can be computed before the host knows which experts they go to."""

    def __init__(self, module: Any, num_experts: int) -> None:
        from moe.kernels import activation_of

        self._module, self._num_experts = module, num_experts
        self._up_name, self._down_name = weight_names(module)
        self._activation = activation_of(module)
        self.biases = biases_of(module)

    def rows(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, slots: GpuSlots) -> "KernelRows":
        """One call."""
        return KernelRows(self, x_TD, expert_TK, slots)

    def weights(self, slots: GpuSlots, slot_E: torch.Tensor | None) -> Any:
        """The slots as kernels see them."""
        from moe.kernels import ExpertWeights

        up, down = (slots.tensors[name] for name in (self._up_name, self._down_name))
        if self._module.is_transposed:
            up, down = up.transpose(-2, -1), down.transpose(-2, -1)
        biases = [slots.tensors.get(f"{name}_bias") for name in (self._up_name, self._down_name)]
        is_halves = self._module.is_concatenated
        return ExpertWeights(up, down, *biases, self._activation, is_halves=is_halves, slot_E=slot_E)

    def nowhere(self, slots: GpuSlots) -> Any:
        """The weights with no expert in any slot: shapes to plan by."""
        slot_E = torch.empty(self._num_experts, dtype=torch.int32, device="meta")
        return self.weights(slots, slot_E)


class KernelRows:
    """The rows of one call, computed by kernels."""

    def __init__(self, layer: KernelExperts, x_TD: torch.Tensor, expert_TK: torch.Tensor, slots: GpuSlots) -> None:
        from moe.kernels import rows_in_parts

        self._layer, self._dtype = layer, x_TD.dtype
        weights = layer.nowhere(slots)
        self._rows = rows_in_parts(x_TD.to(weights.up.dtype), expert_TK, weights)

    def expect(self, num_rows: Mapping[int, int], first: int) -> None:
        """Kernels find their rows themselves."""

    def compute(self, slots: GpuSlots, where: SlotMap) -> None:
        """The rows of all experts that `where` has a slot for."""
        self._rows.compute(self._layer.weights(slots, where.slot_E))

    def put(self, row_n: torch.Tensor, y_nD: torch.Tensor) -> None:
        """Outputs of routed rows that were computed elsewhere."""
        self._rows.put(row_n, y_nD)

    def combine(self, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum, `[T, D]`."""
        y_TD: torch.Tensor = self._rows.combine(weight_TK)
        return y_TD.to(self._dtype)


class LoopExperts:
    """A layer that only plain torch can compute: an unknown gate, a norm after the experts, no Triton.

    Args:
        module: the experts module.
        num_experts: E, whether or not an expert has a slot.
    """

    needs_ids = True

    def __init__(self, module: Any, num_experts: int) -> None:
        self.module, self.num_experts = module, num_experts
        self.biases: dict[str, torch.Tensor] = {}

    def rows(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, slots: GpuSlots) -> "LoopRows":
        """One call."""
        return LoopRows(self.module, x_TD, expert_TK)


class LoopRows:
    """The rows of one call, sorted by expert and computed expert by expert."""

    def __init__(self, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor) -> None:
        self._module, self._x_TD, self._shape = module, x_TD, expert_TK.shape
        _, self._order_N = torch.sort(expert_TK.reshape(-1), stable=True)
        self._x_ND = x_TD[self._order_N // max(expert_TK.shape[1], 1)]
        self._span: dict[int, tuple[int, int]] = {}
        self._out_ND: torch.Tensor | None = None

    def expect(self, num_rows: Mapping[int, int], first: int) -> None:
        """Which experts have how many rows, by ascending id; `first` rows of no expert come before them."""
        for expert in sorted(num_rows):
            self._span[expert] = (first, first + num_rows[expert])
            first += num_rows[expert]

    def compute(self, slots: GpuSlots, where: SlotMap) -> None:
        for expert, slot in where.slot_of.items():
            if expert in self._span:
                start, stop = self._span[expert]
                weights = {name: tensor[slot] for name, tensor in slots.tensors.items()}
                self._write(slice(start, stop), one_expert(self._module, self._x_ND[start:stop], weights, expert))

    def put(self, row_n: torch.Tensor, y_nD: torch.Tensor) -> None:
        self._write(self._places()[row_n], y_nD)

    def combine(self, weight_TK: torch.Tensor) -> torch.Tensor:
        if self._out_ND is None:
            return torch.zeros_like(self._x_TD)
        out_ND = self._out_ND
        if getattr(self._module, "has_post_expert_norm", False):
            out_ND = self._module.post_expert_norm(out_ND)
        weighted_ND = out_ND * weight_TK.reshape(-1)[self._order_N].unsqueeze(-1)
        return weighted_ND[self._places()].view(*self._shape, -1).sum(dim=1).to(self._x_TD.dtype)

    def _write(self, places: Any, y_nD: torch.Tensor) -> None:
        if self._out_ND is None:
            self._out_ND = y_nD.new_zeros(len(self._order_N), y_nD.shape[1])
        self._out_ND[places] = y_nD.to(self._out_ND.dtype)

    def _places(self) -> torch.Tensor:
        place_N = torch.empty_like(self._order_N)
        place_N[self._order_N] = torch.arange(len(place_N), device=place_N.device)
        return place_N


def one_expert(
    module: Any, x_nD: torch.Tensor, weights: Mapping[str, torch.Tensor], expert: int, multiply: Multiply = torch.mm
) -> torch.Tensor:
    """All of one expert but its norm, `[n, D]`.

    Args:
        module: flags, gate and biases, on the device of the weights.
        multiply: the product of rows with a matrix `[columns, outputs]`.
    """
    up_name, down_name = weight_names(module)

    def project(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[name] if module.is_transposed else weights[name].t()
        product = multiply(rows.to(weight.dtype), weight)
        return product + getattr(module, f"{name}_bias")[expert] if module.has_bias else product

    up_nF = project(x_nD, up_name)
    return project(module._apply_gate(up_nF) if module.has_gate else module.act_fn(up_nF), down_name)


def biases_of(module: Any) -> dict[str, torch.Tensor]:
    """The biases of an experts module, `[E, ...]` by name."""
    return {f"{name}_bias": getattr(module, f"{name}_bias") for name in weight_names(module)} if module.has_bias else {}


def experts_for(module: Any, num_experts: int, dtype: torch.dtype, device: torch.device) -> KernelExperts | LoopExperts:
    """How a layer is computed on this device.

    Args:
        dtype: dtype of the experts' weights; some have no kernel on some devices.
    """
    if importlib.util.find_spec("triton") is not None:
        from moe.kernels import can_compute_in

        if can_compute_in(module, dtype, device):
            return KernelExperts(module, num_experts)
    return LoopExperts(module, num_experts)
