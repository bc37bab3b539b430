"""A model folder before anything is loaded: its config and class as transformers reads them, and where experts lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.auto_factory import _get_model_class

import moe  # noqa: F401  registers our own model type with transformers

from .conversion import Matches
from .experts import ExpertLayer, experts_modules, locate_experts, match_checkpoint, weight_names
from .gguf.architectures import expect_architecture
from .gguf.config import config_of, dtype_of
from .gguf.head import has_config_file, is_gguf, read_gguf
from .location import check_config_file, local_folder, read_json
from .plain_weights import expect_plain_weights
from .quantised.description import find_quantisation, without_quantisation
from .quantised.spellings import COMPANION_ENDINGS
from .quantised.view import plain_view
from .tensors import PLAIN_DTYPES, TensorEntry, read_checkpoint

__all__ = ["local_folder", "model_class_of", "read_config", "read_weights", "skeleton_of"]


def skeleton_of(path_or_id: str | Path) -> tuple[Any, dict[str, TensorEntry], list[ExpertLayer]]:
    """A model without weights, its checkpoint's tensors, and where its experts lie.

    Raises:
        ValueError: if the checkpoint is damaged or its experts cannot be offloaded.
    """
    folder = local_folder(path_or_id)
    if is_gguf(folder):
        raise ValueError(f"model {folder}: experts of a GGUF file lie in one piece each; they are not packed again")
    sketch, entries = sketch_of(folder, "auto")
    expect_plain_weights(folder, sketch.skeleton, entries, sketch.found)
    return sketch.skeleton, entries, sketch.layers(entries)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketch:
    """A model before its weights.

    Args:
        folder: of its files.
        config: of `read_config`.
        dtype: that it runs in.
        skeleton: the model on the meta device, each parameter in the dtype that it will have.
        expected: all tensors of its state by full name; of the skeleton, experts' weights may be taken out.
        experts: full names of the experts' weights.
        found: what `match_checkpoint` says of it.
    """

    folder: Path
    config: Any
    dtype: torch.dtype
    skeleton: Any
    expected: Mapping[str, torch.Tensor]
    experts: frozenset[str]
    found: Matches

    def layers(self, entries: Mapping[str, TensorEntry]) -> list[ExpertLayer]:
        """Where its experts lie; none in a dense model."""
        dtypes = {name: tensor.dtype for name, tensor in self.expected.items()}
        return locate_experts(self.skeleton, entries, dtypes, self.found)


def sketch_of(
    folder: Path, dtype: str | torch.dtype, *, needs_experts: bool = True
) -> tuple[Sketch, dict[str, TensorEntry]]:
    """Sketch a model, and read which tensors its checkpoint has.

    Args:
        folder: a model folder.
        dtype: see `running_dtype_of`.
        needs_experts: whether a model without experts is refused.

    Raises:
        ValueError: if the checkpoint is damaged, or its config describes no model.
    """
    config = read_config(folder)
    entries, running = read_weights(folder, config, dtype)
    skeleton = empty_model(folder, config, running, needs_experts=needs_experts)
    _keep_wide(skeleton, running)
    modules = experts_modules(skeleton)
    sketch = Sketch(
        folder=folder,
        config=config,
        dtype=running,
        skeleton=skeleton,
        expected=skeleton.state_dict(),
        experts=frozenset(f"{name}.{weight}" for name, module in modules.items() for weight in weight_names(module)),
        found=match_checkpoint(skeleton, entries),
    )
    return sketch, entries


def read_weights(folder: Path, config: Any, dtype: str | torch.dtype) -> tuple[dict[str, TensorEntry], torch.dtype]:
    """Every tensor of a checkpoint as if it were plain, and the dtype that its model runs in.

    Args:
        config: of `read_config`.
        dtype: see `running_dtype_of`.

    Raises:
        ValueError: if files are missing or damaged, or codes lack a companion.
    """
    entries = read_checkpoint(folder)
    # scales are float32 beside weights that are not
    weights = {name: entry for name, entry in entries.items() if not name.endswith(COMPANION_ENDINGS)}
    running = running_dtype_of(dtype, config, weights)
    return plain_view(folder, entries, find_quantisation(folder), running), running


def _keep_wide(skeleton: Any, dtype: torch.dtype) -> None:
    """Give parameters that loading keeps in float32 (scales, sometimes the head) the dtype that they will have."""
    kept = skeleton._get_dtype_plan(dtype)
    if not kept:
        return
    pattern, names_of_groups, _ = build_glob_alternation(list(kept))
    for name, parameter in skeleton.named_parameters():
        if found := pattern.search(name):
            parameter.data = parameter.data.to(kept[names_of_groups[str(found.lastgroup)]])


def empty_model(folder: Path, config: Any, dtype: torch.dtype | None, *, needs_experts: bool = True) -> Any:
    """The model on the meta device.

    Args:
        folder: of the model, for messages.
        config: names the class and its sizes.
        dtype: of its parameters; None is that of the config.
        needs_experts: whether a model without experts is refused.

    Raises:
        ValueError: if it cannot be built, or has no experts that can be offloaded.
    """
    model_class = model_class_of(config)
    try:
        with torch.device("meta"):
            skeleton = model_class._from_config(config, dtype=dtype)
    except Exception as error:  # a config may contradict itself in any way
        raise ValueError(
            f"model {folder}: its config.json does not describe a {model_class.__name__} ({_first_line(error)})"
        ) from error
    if needs_experts and not experts_modules(skeleton):
        raise ValueError(
            f"model {folder}: {model_class.__name__} does not compute its experts through transformers' experts "
            "interface (or has none), so they cannot be offloaded"
        )
    return skeleton


def read_config(folder: Path) -> Any:
    """The config of the model that `AutoModelForCausalLM` makes of a folder: of a composite one, the part for text.

    Raises:
        ValueError: if there is none, it cannot be read or needs code of its own.
    """
    if is_gguf(folder):
        return _config_of_gguf(folder)
    check_config_file(folder)
    described = read_json(folder / "config.json", f"model {folder}: config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class checks its own fields, and raises what it likes
        kind = described.get("model_type")
        if "auto_map" in described:
            raise ValueError(
                f"model {folder}: model type {kind!r} is Python code in the folder, which is never run; "
                "only models that transformers itself has can be offloaded"
            ) from error
        if "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
            raise ValueError(
                f"model {folder}: transformers does not know model type {kind!r}; it may be newer than this version"
            ) from error
        raise ValueError(f"model {folder}: config.json cannot be read: {_first_line(error)}") from error
    return _text_part(without_quantisation(config))


def _config_of_gguf(file: Path) -> Any:
    """The config.json beside a GGUF file; without one, what the file itself says."""
    head = read_gguf(file)
    expect_architecture(file, head.architecture)
    config = read_config(file.parent) if has_config_file(file) else config_of(head)
    if getattr(config, "dtype", None) is None:
        config.dtype = getattr(torch, dtype_of(head))
    return config


def _text_part(config: Any) -> Any:
    """What `AutoModelForCausalLM.from_pretrained` passes on: the config, or its part if the class wants that."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return config
    wanted = getattr(model_class_of(config), "config_class", None)
    if wanted is not None and wanted == config.sub_configs.get("text_config"):
        return config.get_text_config()
    return config


def running_dtype_of(dtype: str | torch.dtype, config: Any, entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """The dtype that a model runs in.

    Args:
        dtype: a dtype or its name; `"auto"` is the config's, else that of the first floating tensor by file and
            name, as in transformers.
        config: names the architecture.
        entries: the checkpoint's tensors.
    """
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        dtype = found if isinstance(found, torch.dtype) else "none"
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype != "auto":
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32; got {dtype!r}")
    declared = getattr(config, "dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    in_order = sorted(entries.values(), key=lambda entry: (entry.file, entry.name))
    return next((entry.torch_dtype() for entry in in_order if entry.dtype in PLAIN_DTYPES), torch.float32)


def model_class_of(config: Any) -> Any:
    """The class that transformers' `AutoModelForCausalLM` chooses, else the one that the config names.

    Raises:
        ValueError: if there is none.
    """
    import transformers

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return _get_model_class(config, mapping)
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(f"no causal language model is known for model type {config.model_type!r}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
