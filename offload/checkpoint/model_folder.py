"""A model folder before anything is loaded: where it is, its config, its class, and where its experts lie."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .experts import ExpertLayer, experts_modules, locate_experts
from .tensors import TensorEntry, read_checkpoint


def skeleton_of(path_or_id: str | Path) -> tuple[Any, dict[str, TensorEntry], list[ExpertLayer]]:
    """A model without weights, its checkpoint's tensors, and where its experts lie.

    Raises:
        ValueError: if the checkpoint is damaged or its experts cannot be offloaded.
    """
    folder = local_folder(path_or_id)
    entries, config = read_checkpoint(folder), read_config(folder)
    with torch.device("meta"):
        skeleton = model_class_of(config)._from_config(config, dtype=running_dtype_of("auto", config, entries))
    if not experts_modules(skeleton):
        raise ValueError(f"model {folder}: {type(skeleton).__name__} has no experts that can be offloaded")
    dtypes = {name: parameter.dtype for name, parameter in skeleton.state_dict().items()}
    return skeleton, entries, locate_experts(skeleton, entries, dtypes)


def local_folder(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path_or_id).startswith(".") or str(path_or_id).count("/") != 1:
        raise ValueError(f"model {path_or_id}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(path_or_id), allow_patterns=wanted))
    except Exception as error:
        raise ValueError(
            f"model {path_or_id}: neither a folder here nor a model id that can be downloaded ({error})"
        ) from error


def read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {folder}: config.json is missing")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (KeyError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"model {folder}: config.json cannot be read: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.to_dict()["quantization_config"]).get("quant_method", "unknown")
        raise ValueError(
            f"model {folder}: its weights are quantised ({method}); offloading reads plain float weights, "
            "so save a dequantised copy first"
        )
    return config


def running_dtype_of(dtype: str | torch.dtype, config: Any, entries: Mapping[str, TensorEntry]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype must be auto, bfloat16, float16 or float32; got {dtype!r}")
        return found
    declared = getattr(config, "dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    return next(
        (entry.torch_dtype() for entry in entries.values() if entry.dtype in ("F32", "F16", "BF16")), torch.float32
    )


def model_class_of(config: Any) -> Any:
    import transformers

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(f"no causal language model is known for model type {config.model_type!r}")
