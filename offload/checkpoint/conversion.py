"""transformers' checkpoint conversions, seen from one expert: what they ask of the model, and to whom a list goes."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

Matches = dict[str, list[tuple[str, str | None]]]


class OneExpert:
    """A model as a conversion should see it that gets one expert: parameters of experts modules are `[1, ...]`.

    Args:
        model: the model, or its skeleton. If its expert weights are gone, `expert_shapes` says what they were.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor without memory, of the shape that one expert's share of a parameter has."""
        shapes: Mapping[str, tuple[int, ...]] = getattr(self._model, "expert_shapes", {})
        shape = shapes[name] if name in shapes else tuple(self._model.get_parameter(name).shape)
        return torch.empty((1, *shape[1:]), device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def spread_over_banks(found: Matches, converters: Sequence[WeightConverter]) -> Matches:
    """Give each bank of experts its keys, where one list of experts in the checkpoint fills several banks.

    Such a conversion has several targets, and cuts the list into equal parts, in order; its keys are all matched to the
    first target.

    Args:
        found: parameter name -> keys and the pattern that each matched.
        converters: transformers' rules for the model's weights, in order.
    """
    by_pattern = {
        pattern: converter
        for converter in converters
        if _cuts_lists(converter)
        for pattern in converter.source_patterns
    }
    spread: Matches = {}
    for name, keys in found.items():
        converter = next((by_pattern[pattern] for _, pattern in keys if pattern in by_pattern), None)
        if converter is None:
            spread.setdefault(name, []).extend(keys)
            continue
        targets = [target.replace("\\", "") for target in converter.target_patterns]
        first = next(target for target in targets if target in name)
        for pattern in converter.source_patterns:
            group = [pair for pair in keys if pair[1] == pattern]
            size = ceil(len(group) / len(targets))
            for place, target in enumerate(targets):
                spread.setdefault(name.replace(first, target), []).extend(group[place * size : (place + 1) * size])
    return spread


def steps_of(converter: WeightConverter, full_name: str) -> tuple[Sequence[Any], list[str]]:
    """Operations that make one expert of the parameter `full_name`, and the patterns of what they make."""
    if not _cuts_lists(converter):
        return converter.operations, converter.target_patterns
    (cut,) = converter.operations
    target = next(target for target in converter.target_patterns if target.replace("\\", "") in full_name)
    steps: list[Any] = [MergeModulelist(dim=cut.stack_dim)]
    if len(converter.source_patterns) > 1:
        steps.append(Concatenate(dim=cut.concat_dim))
    return steps, [target]


def _cuts_lists(converter: WeightConverter) -> bool:
    return len(converter.operations) == 1 and hasattr(converter.operations[0], "split_list_into_chunks")
