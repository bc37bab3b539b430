"""A GGUF model opened: its class without weights, what each tensor is, and everything but experts loaded."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..experts import experts_modules, weight_names
from ..model_folder import empty_model, read_config, running_dtype_of
from ..resident_weights import generation_config_of, hollow_weight, model_of_state
from .architectures import Change, change_of
from .head import GgufHead, has_config_file, read_gguf
from .names import GgufNames, match_names
from .tensors import Expand, GgufTensor
from .text import end_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufModel:
    """A GGUF model of which nothing is loaded yet.

    Args:
        head: what its files say.
        config: its own config.json's, else made from the file.
        skeleton: the model on the meta device, in the dtype it will run in.
        names: what each tensor is.
    """

    head: GgufHead
    config: Any
    skeleton: Any
    names: GgufNames

    @property
    def change(self) -> Change:
        """What makes the model's values of the file's."""
        return change_of(self.head.architecture, self.config)


def open_gguf_model(file: Path, dtype: str | torch.dtype = "auto") -> GgufModel:
    """Read the heads of a GGUF model and match its tensors to the model's parameters.

    Args:
        file: the GGUF file, or any of a split model.
        dtype: to run in; `"auto"` is that of the config.

    Raises:
        ValueError: if it is damaged, of an unknown architecture, or tensors are missing or left over.
    """
    head, config = read_gguf(file), read_config(file)
    skeleton = empty_model(file, config, running_dtype_of(dtype, config, {}), needs_experts=False)
    names = match_names(head, skeleton, has_config_file=has_config_file(file))
    return GgufModel(head=head, config=config, skeleton=skeleton, names=names)


def load_gguf_resident(opened: GgufModel, implementation: str, expand: Expand, hollow: Collection[str] = ()) -> Any:
    """Let transformers load everything but the experts' matrices, which stay hollow, and others that are to.

    Args:
        opened: what to load; only its skeleton and names are used.
        implementation: name of the experts implementation; a dense model needs none.
        expand: makes numbers of stored bytes.
        hollow: full names of parameters outside experts.
    """
    file, dtype = opened.head.file, opened.skeleton.dtype
    shapes = {name: tuple(value.shape) for name, value in opened.skeleton.state_dict().items()}
    state: dict[str, Any] = {}
    for name, entries in opened.names.dense.items():
        if name in hollow:
            state[name] = hollow_weight(shapes[name], dtype)
        else:
            state[name] = GgufTensor(entries, shapes[name], dtype, opened.change, expand)
    for module_name, module in experts_modules(opened.skeleton).items():
        for weight in weight_names(module):
            name = f"{module_name}.{weight}"
            state[name] = hollow_weight(shapes[name], dtype)
    model = model_of_state(file, opened.config, state, dtype, implementation if opened.names.experts else None)
    model.generation_config = generation_config(opened)
    return model


def generation_config(opened: GgufModel) -> GenerationConfig:
    """What ends a text: of the file beside the model, else of the model's own metadata."""
    if has_config_file(opened.head.file):
        return generation_config_of(opened.head.file.parent)
    found = GenerationConfig.from_model_config(opened.config)
    found.eos_token_id = end_tokens(opened.head) or found.eos_token_id
    return found
