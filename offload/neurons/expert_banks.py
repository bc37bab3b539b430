"""Experts whose inactive units are exactly zero: those of one layer are a bank of units, expert after expert.

Which tensors make up an expert, one for each or all in one, is asked of what finds experts for the store. So no family
is named here either.

Shapes: E experts, F hidden units of one, D model width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from routing.ground.model_config import experts_per_token

from ..checkpoint.experts import ExpertLayer, experts_modules, weight_names
from ..checkpoint.tensors import TensorEntry
from ..formats.plain import PlainForm
from ..formats.quantised_parts import is_quantised
from .unit_layer import UnitLayer, expect_zero_below_zero, rounded, stamp, stored_bytes

STAMP_BYTES = 1 << 12
"""Of each expert's beginning, in each tensor: a model has thousands of experts, and each is stamped when it is opened.
Another checkpoint of the same shapes differs there."""
NOT_BY_UNITS: Mapping[str, str] = {
    "has_bias": "its experts add biases",
    "is_transposed": "it holds the matrices of its experts transposed",
    "has_post_expert_norm": "it normalises what an expert gives",
    "is_own_loop": "only its own code computes its experts",
}
"""Flags of experts modules that are not computed by units, and what they mean."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertBank(UnitLayer):
    """All experts of a layer: unit f of expert e has the number e F + f.

    Args:
        layer: where the checkpoint has them.
        model: the skeleton, which conversions ask for shapes.
    """

    layer: ExpertLayer
    model: Any

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layer.num_experts

    @property
    def expert_units(self) -> int:
        """F."""
        return self.num_units // self.num_experts

    @property
    def weight_names(self) -> frozenset[str]:
        return frozenset(parameter.full_name for parameter in self.layer.parameters)

    def stamps(self) -> tuple[str, ...]:
        sources = [source for parameter in self.layer.parameters for source in parameter.sources]
        return tuple(
            stamp(*(_beginning(*source.place(expert)) for expert in range(self.num_experts))) for source in sources
        )

    def matrices(self) -> Iterator[tuple[torch.Tensor, ...]]:
        form = PlainForm(self.layer)
        room, unshifted = torch.empty(form.slot_bytes, dtype=torch.uint8), (0,) * len(form.regions)
        for expert in range(self.num_experts):
            form.convert(expert, room, self.model, _part)
            before, down_DF = (form.views(room, unshifted)[each.name] for each in self.layer.parameters)
            yield (*before.chunk(len(self.parts) - 1), down_DF)


def find_expert_banks(model: Any, layers: Sequence[ExpertLayer]) -> tuple[ExpertBank, ...]:
    """The experts of every layer of a model, as banks of units.

    Args:
        model: without weights; its experts modules are asked how they compute.
        layers: where its experts lie.

    Raises:
        ValueError: if units that are not active are not zero, or experts are stored or computed in another way.
    """
    top_k, modules = experts_per_token(model.config), experts_modules(model)
    return tuple(_bank(model, layer, modules[layer.module_name], top_k) for layer in layers)


def _bank(model: Any, layer: ExpertLayer, module: Any, top_k: int) -> ExpertBank:
    name = layer.module_name
    if reason := _obstacle(module):
        raise ValueError(f"{name} ({type(module).__name__}) is not computed by units: {reason}")
    activation = getattr(module, "act_fn", None)
    kind = type(module if activation is None else activation).__name__
    expect_zero_below_zero(name, lambda gate: hidden_units(module, [gate, torch.ones_like(gate)]), kind)
    if is_quantised(layer):
        raise ValueError(f"{name}: its experts are stored as codes; `expertier dequantise` writes a plain copy")
    by_name = {parameter.name: parameter for parameter in layer.parameters}
    before, down = (by_name[each] for each in weight_names(module))
    parts = ("gate_proj", "up_proj", "down_proj") if module.has_gate else ("up_proj", "down_proj")
    D, F = down.shape
    if before.shape != ((len(parts) - 1) * F, D) or before.dtype != down.dtype:
        raise ValueError(
            f"{name}: a row and a column of one unit must have the same length and dtype; got {before.name} "
            f"{list(before.shape)} {before.dtype}, down_proj {list(down.shape)} {down.dtype}"
        )
    return ExpertBank(
        name=name,
        parts=parts,
        num_units=layer.num_experts * F,
        rows_at_once=min(top_k, layer.num_experts) * rounded(F),
        width=D,
        dtype=down.dtype,
        layer=ExpertLayer(name, layer.num_experts, (before, down)),
        model=model,
    )


def _obstacle(module: Any) -> str | None:
    if module.has_gate and not module.is_concatenated:
        return "rows of gate and up alternate in its experts"
    return next((reason for flag, reason in NOT_BY_UNITS.items() if getattr(module, flag, False)), None)


def hidden_units(module: Any, products: Sequence[torch.Tensor]) -> torch.Tensor:
    """What units of an expert give, of the products with their rows.

    Args:
        module: the experts module, whose own activation is used.
        products: of the gate, and of the other rows if the module has such.
    """
    if not module.has_gate:
        return module.act_fn(products[0])  # type: ignore[no-any-return]
    return module._apply_gate(torch.cat(list(products), dim=-1))  # type: ignore[no-any-return]


def _beginning(entry: TensorEntry, offset: int, nbytes: int) -> bytearray:
    return stored_bytes(entry.file, offset, min(STAMP_BYTES, nbytes), entry.name)


def _part(entry: TensorEntry, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
    data = stored_bytes(entry.file, offset, nbytes, entry.name)
    return torch.frombuffer(data, dtype=entry.torch_dtype()).view(shape)
