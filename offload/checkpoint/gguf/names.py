"""Which tensor of a GGUF file is which parameter of the model, with nothing left over on either side."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..experts import experts_modules, weight_names
from ..tensors import TensorEntry
from .head import GgufHead
from .library import gguf_library

EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.weight")
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""What a config.json says in words; without one, a model that has them would turn its positions wrongly."""
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertMatrix:
    """Rows of one parameter of an experts module, stored as one GGUF tensor `[E, rows, columns]`.

    Args:
        parameter: name within the module.
        entry: where the rows of all experts lie.
        first_row: of the parameter, as rows of outputs.
        row_step: from one row to the next; 2 where gate and up alternate.
    """

    parameter: str
    entry: TensorEntry
    first_row: int = 0
    row_step: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufNames:
    """What is where.

    Args:
        dense: parameter -> the tensors it consists of; several only for biases of gate and up.
        experts: experts module -> its matrices.
    """

    dense: Mapping[str, tuple[TensorEntry, ...]]
    experts: Mapping[str, tuple[ExpertMatrix, ...]]


def match_names(head: GgufHead, model: Any, *, has_config_file: bool) -> GgufNames:
    """Find every parameter of a model in a GGUF file.

    Args:
        head: says which tensors there are.
        model: the model on the meta device.
        has_config_file: whether the config is the model's own config.json, and not made from the file.

    Raises:
        ValueError: if a parameter has no tensor, or a tensor no parameter; the message names one.
    """
    experts = {name: _expert_matrices(head, name, module) for name, module in experts_modules(model).items()}
    used = {matrix.entry.name for matrices in experts.values() for matrix in matrices}
    hollow = {f"{name}.{weight}" for name, module in experts_modules(model).items() for weight in weight_names(module)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names, dense = _Names(head, model), {}
    for name in model.state_dict():
        if name in hollow:
            continue
        if found := names.entries_of(name):
            dense[name] = found
        elif name not in tied:
            raise ValueError(f"{head.file}: no tensor for {name}; is this model's config another one's?")
    used |= {entry.name for found in dense.values() for entry in found}
    _expect_all_used(head, model, used, has_config_file)
    return GgufNames(dense=dense, experts=experts)


class _Names:
    """The names of one model by the `gguf` package."""

    def __init__(self, head: GgufHead, model: Any) -> None:
        gguf = gguf_library()
        self._head, self._prefix = head, f"{model.base_model_prefix}."
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        layers = int(model.config.get_text_config().num_hidden_layers)
        self._map = gguf.get_tensor_name_map(known[head.architecture], layers)

    def entries_of(self, name: str) -> tuple[TensorEntry, ...]:
        """The tensors that a parameter consists of; none if the file has none."""
        if (bias := re.fullmatch(r"(.*\.experts)\.(gate_up|up|down)_proj_bias", name)) is not None:
            return self._expert_bias(name, bias[2])
        for base, suffix in self._spellings(name):
            found = self._map.get_name(base)
            if found is not None and (entry := self._head.entries.get(found + suffix)) is not None:
                return (entry,)
        return ()

    def _spellings(self, name: str) -> Sequence[tuple[str, str]]:
        """A parameter as the name map may know it, and what follows in the file."""
        for suffix in SUFFIXES:
            if name.endswith(suffix):
                base = name.removesuffix(suffix)
                return [(base, suffix), (base.removeprefix(self._prefix), suffix)]
        corrected = name.removesuffix("_bias")
        return [(name, ""), (name, ".weight"), (name, ".bias"), (corrected, ".bias")]

    def _expert_bias(self, name: str, kind: str) -> tuple[TensorEntry, ...]:
        layer = layer_of(name)
        kinds = ("gate", "up") if kind == "gate_up" else (kind,)
        found = [self._head.entries.get(f"blk.{layer}.ffn_{one}_exps.bias") for one in kinds]
        return tuple(entry for entry in found if entry is not None) if all(found) else ()


def layer_of(name: str) -> int:
    """The number of the layer that a module or parameter belongs to: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _expert_matrices(head: GgufHead, name: str, module: Any) -> tuple[ExpertMatrix, ...]:
    """The matrices of one experts module, with the shapes that the module says.

    Raises:
        ValueError: if one is missing or has another shape.
    """
    up_name, down_name = weight_names(module)
    prefix = f"blk.{layer_of(name)}.ffn_"
    (num, *up_shape), (_, *down_shape) = (_outputs_first(module, weight) for weight in (up_name, down_name))
    parts: list[tuple[str, str, int, int, tuple[int, ...]]] = []
    fused = f"{prefix}gate_up_exps.weight"
    if module.has_gate and fused not in head.entries:
        half = (up_shape[0] // 2, up_shape[1])
        starts = ((0, 1), (half[0], 1)) if module.is_concatenated else ((0, 2), (1, 2))
        for kind, (first, step) in zip(("gate", "up"), starts, strict=True):
            parts.append((up_name, f"{prefix}{kind}_exps.weight", first, step, (num, *half)))
    else:
        if module.has_gate and not module.is_concatenated:
            raise ValueError(f"{head.file}: {fused} has gate after up, and {name} wants them alternating")
        parts.append((up_name, fused if module.has_gate else f"{prefix}up_exps.weight", 0, 1, (num, *up_shape)))
    parts.append((down_name, f"{prefix}down_exps.weight", 0, 1, (num, *down_shape)))
    found = []
    for parameter, stored, first, step, shape in parts:
        entry = head.entries.get(stored)
        if entry is None:
            raise ValueError(f"{head.file}: no tensor {stored} for {name}.{parameter}")
        if entry.shape != shape:
            raise ValueError(f"{head.file}: {stored} has the shape {list(entry.shape)}, {name} wants {list(shape)}")
        found.append(ExpertMatrix(parameter=parameter, entry=entry, first_row=first, row_step=step))
    return tuple(found)


def _outputs_first(module: Any, weight: str) -> tuple[int, ...]:
    """The shape of an experts weight as `[E, outputs, inputs]`."""
    num, rows, columns = getattr(module, weight).shape
    return (num, columns, rows) if module.is_transposed else (num, rows, columns)


def _expect_all_used(head: GgufHead, model: Any, used: set[str], has_config_file: bool) -> None:
    layers = int(model.config.get_text_config().num_hidden_layers)
    for name in sorted(head.entries.keys() - used):
        if name in ROPE_FACTORS and has_config_file:
            continue
        if name in ROPE_FACTORS:
            raise ValueError(
                f"{head.file}: {name} stretches the positions of this model, and only its config.json says how; "
                "put that file beside it"
            )
        if name.startswith("blk.") and layer_of(name) >= layers:
            continue  # layers that predict further tokens; the model does not have them
        if EXPERTS.fullmatch(name):
            raise ValueError(
                f"{head.file}: {type(model).__name__} does not compute its experts through transformers' experts "
                "interface, so they cannot be offloaded"
            )
        raise ValueError(f"{head.file}: the model has no use for tensor {name}; its config may be another model's")
