"""From checkpoint keys to experts: which bytes of which file make up each expert of each layer.

transformers fuses experts while it loads them; its conversion mapping says how. The same operations, run on one expert
whose elements are numbered, show where every element comes from. If those places are a few contiguous runs, an expert
is read straight into its slot; otherwise its parts are read and converted one expert at a time.

No model family is named here: layout flags of the experts module and the mapping say everything.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .conversion import OneExpert, spread_over_banks, steps_of
from .numbering import Origin, trace_elements
from .tensors import TensorEntry

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")
# contiguous pieces of one expert; with more, single reads are too short, and the expert is converted in memory instead
MAX_RUNS = 32


@dataclass(frozen=True, eq=False)
class Source:
    """One checkpoint tensor, or one expert's share of it, as an input of a conversion."""

    pattern: str
    entry_E: tuple[TensorEntry, ...]
    is_fused: bool

    def shape(self) -> tuple[int, ...]:
        shape = self.entry_E[0].shape
        return (shape[0] // len(self.entry_E), *shape[1:]) if self.is_fused else shape

    def place(self, expert: int) -> tuple[TensorEntry, int, int]:
        """Entry, offset in its file and size of this expert's share."""
        entry = self.entry_E[expert]
        if not self.is_fused:
            return entry, entry.offset, entry.nbytes
        share = entry.nbytes // len(self.entry_E)
        return entry, entry.offset + expert * share, share


@dataclass(frozen=True, eq=False)
class Parameter:
    """One offloaded parameter of an experts module, `[E, *shape]` in the model."""

    name: str
    full_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Source, ...]
    converter: WeightConverter | None
    runs: tuple[tuple[int, int, int, int], ...] | None
    """(source, element in the source, element in the parameter, elements), or None if it has to be converted."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The experts of one layer, and where the checkpoint has them."""

    module_name: str
    num_experts: int
    parameters: tuple[Parameter, ...]

    @property
    def plain_bytes(self) -> int:
        """One expert as the model computes with it."""
        return sum(parameter.nbytes for parameter in self.parameters)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute through transformers' experts interface, by name, in the order of the layers."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, flag) for flag in flags)}


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The two parameters of an experts module that hold one matrix per expert."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def match_checkpoint(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, list[tuple[str, str | None]]]:
    """Parameter name -> the checkpoint keys it is made of, with the pattern that matched, in transformers' order."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, list[tuple[str, str | None]]] = defaultdict(list)

    def renamed(key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            return rename_source_key(key, [], [], prefix, expected)
        return name, pattern

    # Patterns do not tell one expert of a list from another, so one of each list is matched for all: a model of 1,000
    # GB has 70,000 of them, and seconds of regular expressions and of sorting.
    for keys in _lists_of_experts(entries):
        name, pattern = renamed(keys[0])
        found[name].append((keys[0], pattern))
        for key in keys[1:]:
            name, pattern = (name, pattern) if pattern is not None else renamed(key)
            found[name].append((key, pattern))
    return spread_over_banks(found, converters)


def _lists_of_experts(entries: Iterable[str]) -> list[list[str]]:
    """Keys that differ in an expert's number only, by this number; the lists are in the order of transformers."""
    lists: dict[tuple[str, ...], list[tuple[list[int], str]]] = defaultdict(list)
    for key in entries:
        pieces = EXPERT_NUMBER.split(key)
        lists[tuple(pieces[::2])].append(([int(number) for number in pieces[1::2]], key))
    in_order = [[key for _, key in sorted(numbered)] for numbered in lists.values()]
    return sorted(in_order, key=lambda keys: dot_natural_key(keys[0]))


def locate_experts(
    model: Any,
    entries: Mapping[str, TensorEntry],
    dtypes: Mapping[str, torch.dtype],
    found: Mapping[str, list[tuple[str, str | None]]] | None = None,
) -> list[ExpertLayer]:
    """Where the experts of every layer of `model` lie in its checkpoint.

    Args:
        model: the model, or its skeleton on the meta device; only names, shapes and flags are used.
        entries: the checkpoint's tensors.
        dtypes: parameter name -> dtype it has in the running model.
        found: what `match_checkpoint` says of the two, if that is known; it takes seconds for 200,000 tensors.

    Raises:
        ValueError: if the checkpoint lacks an expert, or its layout cannot be read one expert at a time.
    """
    found = match_checkpoint(model, entries) if found is None else found
    converters = {
        pattern: entry
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter)
        for pattern in entry.source_patterns
    }
    shared: dict[Any, Any] = {}
    layers = []
    for module_name, module in experts_modules(model).items():
        parameters = []
        for name in weight_names(module):
            weight = getattr(module, name, None)
            if weight is None or weight.dim() != 3:
                raise ValueError(
                    f"{type(module).__name__} ({module_name}) has no weight {name} [E, rows, columns]; "
                    "its experts cannot be offloaded"
                )
            full_name = f"{module_name}.{name}"
            keys = found.get(full_name)
            if not keys:
                if full_name in (getattr(model, "all_tied_weights_keys", None) or {}):
                    raise ValueError(f"the experts of {full_name} are shared by two modules, and cannot be offloaded")
                raise ValueError(f"the checkpoint has no tensor for {full_name}; is a shard missing?")
            sources, converter = _sources(full_name, keys, entries, weight.shape[0], converters)
            parameters.append(
                _parameter(model, name, full_name, tuple(weight.shape), dtypes[full_name], sources, converter, shared)
            )
        layers.append(ExpertLayer(module_name, int(weight.shape[0]), tuple(parameters)))
    return layers


def _sources(
    full_name: str,
    keys: Sequence[tuple[str, str | None]],
    entries: Mapping[str, TensorEntry],
    num_experts: int,
    converters: Mapping[str, WeightConverter],
) -> tuple[tuple[Source, ...], WeightConverter | None]:
    by_pattern: dict[str | None, list[TensorEntry]] = defaultdict(list)
    for key, pattern in keys:
        by_pattern[pattern].append(entries[key])
    sources = []
    for pattern, group in by_pattern.items():
        is_fused = len(group) == 1 and num_experts >= 1 and _leads_with_experts(group[0], num_experts)
        if not is_fused and len(group) != num_experts:
            raise ValueError(
                f"{full_name} needs {num_experts} experts; the checkpoint has {len(group)} tensors for "
                f"{pattern or full_name}, the first is {group[0].name} {list(group[0].shape)}"
            )
        if len({(entry.shape, entry.dtype, entry.layout) for entry in group}) != 1:
            raise ValueError(
                f"{full_name}: the experts' tensors {pattern} differ in shape, dtype or stored form; "
                "`expertier dequantise` writes a plain copy of experts that are quantised differently"
            )
        sources.append(Source(pattern or full_name, tuple(group) * (num_experts if is_fused else 1), is_fused))
    patterns = [pattern for pattern in by_pattern if pattern is not None]
    return tuple(sources), converters[patterns[0]] if patterns else None


def _leads_with_experts(entry: TensorEntry, num_experts: int) -> bool:
    if len(entry.shape) == 3:
        return entry.shape[0] == num_experts
    return num_experts > 1 and len(entry.shape) == 2 and entry.shape[0] % num_experts == 0


def _parameter(
    model: Any,
    name: str,
    full_name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    sources: tuple[Source, ...],
    converter: WeightConverter | None,
    shared: dict[Any, Any],
) -> Parameter:
    """Build one parameter; `shared` remembers the runs of layouts seen before."""
    same_dtype = all(source.entry_E[0].torch_dtype() == dtype for source in sources)
    signature = (name, shape, same_dtype, tuple((source.pattern, source.shape()) for source in sources))
    if signature not in shared:
        origin = _origin(model, full_name, shape, sources, converter)
        shared[signature] = _runs(origin, sources) if same_dtype else None
    return Parameter(name, full_name, shape[1:], dtype, sources, converter, shared[signature])


def convert_expert(
    model: Any,
    full_name: str,
    sources: Sequence[Source],
    converter: WeightConverter | None,
    parts: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Run transformers' own conversion on the parts of one expert; gives the parameter `[1, ...]`."""
    if converter is None:
        return parts[0]
    collected: dict[str, Any] = {source.pattern: [part] for source, part in zip(sources, parts, strict=True)}
    operations, targets = steps_of(converter, full_name)
    for operation in operations:
        collected = operation.convert(
            collected,
            source_patterns=converter.source_patterns,
            target_patterns=targets,
            full_layer_name=full_name,
            model=OneExpert(model),
            config=model.config,
            missing_keys=None,
        )
    for target, value in collected.items():
        if target.replace("\\", "") in full_name:
            return value[0] if isinstance(value, list) else value
    raise ValueError(f"{full_name}: the conversion gave {sorted(collected)}")


def _origin(
    model: Any,
    full_name: str,
    shape: tuple[int, ...],
    sources: Sequence[Source],
    converter: WeightConverter | None,
) -> Origin:
    """Where every element of one expert's parameter comes from; checked to be one to one."""
    shapes = [source.shape() for source in sources]

    def convert(parts: list[torch.Tensor]) -> torch.Tensor:
        return convert_expert(model, full_name, sources, converter, parts)

    try:
        # without a converter the parameter is its one source as it lies
        as_it_lies = Origin(shape=shapes[0], is_whole=len(shapes) == 1, starts=(0,), numbers=(0,))
        found = trace_elements(convert, shapes, MAX_RUNS) if converter is not None else as_it_lies
    except Exception as error:
        raise ValueError(
            f"{full_name}: transformers' conversion does not work on one expert at a time ({error}); "
            "save the model with this version of transformers and load that"
        ) from error
    if not found.is_whole or found.shape[-len(shape[1:]) :] != shape[1:] or prod(found.shape) != prod(shape[1:]):
        raise ValueError(
            f"{full_name}: one expert of the checkpoint gives {list(found.shape)}, the model wants {list(shape[1:])}; "
            "this layout cannot be read one expert at a time"
        )
    return found


def _runs(origin: Origin, sources: Sequence[Source]) -> tuple[tuple[int, int, int, int], ...] | None:
    if len(origin.starts) > MAX_RUNS:
        return None
    sizes = [prod(source.shape()) for source in sources]
    runs: list[tuple[int, int, int, int]] = []
    for (begin, end), element in zip(pairwise([*origin.starts, sum(sizes)]), origin.numbers, strict=True):
        while begin < end:
            index, inside = _which(sizes, element)
            count = min(end - begin, sizes[index] - inside)
            runs.append((index, inside, begin, count))
            begin, element = begin + count, element + count
    return tuple(runs)


def _which(sizes: Sequence[int], element: int) -> tuple[int, int]:
    for index, size in enumerate(sizes):
        if element < size:
            return index, element
        element -= size
    raise AssertionError("element lies outside its sources")
