"""Everything of a model but its experts and what is streamed, loaded by transformers itself."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from .experts import experts_modules, weight_names
from .model_folder import Sketch, model_class_of
from .quantised.entry import lazy_tensor
from .tensors import TORCH_DTYPES, TensorEntry


class _Hollow:
    """Stands in for a weight that stays on disk while transformers loads the rest: the right shape, no memory.

    What uses it by mistake gets no number at all, which shows.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def is_floating_point(self) -> bool:
        return True

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, key: Any) -> "_Hollow":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full((), torch.nan, dtype=dtype or self.dtype).expand(self.shape)


def load_resident(
    sketch: Sketch, entries: Mapping[str, TensorEntry], implementation: str, streamed: Collection[str] = ()
) -> Any:
    """Let transformers load everything but the experts' matrices and what is streamed, which stay hollow.

    Args:
        sketch: the model without weights.
        entries: the checkpoint's tensors.
        implementation: name of the experts implementation.
        streamed: full names of parameters outside experts.
    """
    folder, found, expected = sketch.folder, sketch.found, sketch.expected
    state: dict[str, Any] = {}
    hollow = {*sketch.experts, *(name for name in streamed if name in found)}
    for name, keys in found.items():
        if name not in hollow:
            # an unused tensor of a dtype that torch cannot name says nothing about the model; a used one is an error
            readable = [key for key, _ in keys if name in expected or entries[key].dtype in TORCH_DTYPES]
            state.update({key: lazy_tensor(entries[key]) for key in readable})
    for name in hollow & expected.keys():
        if name not in found:
            raise ValueError(f"model {folder}: the checkpoint has no tensor for {name}; is a shard missing?")
        state[name] = _Hollow(tuple(expected[name].shape), expected[name].dtype)
    model = model_of_state(folder, sketch.config, state, sketch.dtype, implementation if sketch.experts else None)
    model.generation_config = generation_config_of(folder)
    return model


def hollow_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """What stands for an experts weight in the state that `model_of_state` loads."""
    return _Hollow(shape, dtype)


def model_of_state(
    source: Path, config: Any, state: Mapping[str, Any], dtype: torch.dtype, implementation: str | None
) -> Any:
    """Let transformers load a model from tensors by name, and refuse what is missing or has another shape.

    Args:
        source: folder or file of the model, for messages.
        state: tensors, or what is read when it is indexed.
        dtype: of the running model.
        implementation: name of the experts implementation; None leaves a model without experts as it is.
    """
    model, info = model_class_of(config).from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        dtype=dtype,
        experts_implementation=implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    _check_loaded(source, info)
    model.name_or_path = model.config.name_or_path = str(source)
    return model.requires_grad_(False)


def generation_config_of(folder: Path) -> GenerationConfig:
    """End tokens and other defaults of `generate`: from their own file, else from config.json, as in transformers."""
    try:
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"model {folder}: generation_config.json cannot be read: {error}") from error


def _check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {folder}: the checkpoint has no tensor for {missing[0]} and {len(missing) - 1} others; "
            "is a shard missing?"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"model {folder}: {name} has the shape {list(stored)} in the checkpoint and {list(wanted)} by config.json"
        )
    for kind in ("conversion_errors", "error_msgs"):
        if problems := info.get(kind):
            raise ValueError(f"model {folder}: {kind.replace('_', ' ')}: {str(problems)[:500]}")


def drop_expert_weights(model: Any) -> None:
    """Take the hollow weights out, so that nothing can use or save them; `expert_shapes` remembers them."""
    model.expert_shapes = {
        f"{name}.{weight}": tuple(getattr(module, weight).shape)
        for name, module in experts_modules(model).items()
        for weight in weight_names(module)
    }
    for module in experts_modules(model).values():
        for name in weight_names(module):
            delattr(module, name)
