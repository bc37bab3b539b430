"""The fine-tuned model as a Hugging Face folder that transformers, `offload.load` and other engines read."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from routing.ground.files import write_json

from ...checkpoint.experts import ExpertLayer
from ...checkpoint.location import local_folder, read_json
from ...checkpoint.weight_files import INDEX_NAME

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
TABLES = (".index.json",)
NOT_COPIED = ("config.json", "finetune.json", "metrics.jsonl")
"""Written anew, or of a run that made the model."""

LayerWeights = Iterator[tuple[int, dict[str, torch.Tensor]]]
"""(expert, its matrices), in any order."""


def write_model(out: Path, source: str | Path, model: Any, layers: Iterable[tuple[ExpertLayer, LayerWeights]]) -> None:
    """Write a model, one layer's experts at a time; the index and config.json come last.

    Args:
        out: an empty folder.
        source: the model that was fine-tuned, whose other files are copied.
        model: everything but its experts.
        layers: the experts of each MoE layer.
    """
    weight_map: dict[str, str] = {}
    size = _write_shard(out, "model-resident.safetensors", _resident(model), model, weight_map)
    for number, (layer, experts) in enumerate(layers):
        size += _write_shard(out, f"model-experts-{number:03}.safetensors", _stacked(layer, experts), model, weight_map)
    write_json(out / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    folder = local_folder(source)
    for file in folder.iterdir():
        is_data = file.name.startswith(".") or file.name.endswith((*WEIGHTS, *TABLES)) or file.name in NOT_COPIED
        if file.is_file() and not is_data:
            shutil.copyfile(file, out / file.name)
    config = read_json(folder / "config.json", f"model {folder}: config.json")
    config.pop("transformers_weights", None)
    write_json(out / "config.json", config | {"dtype": str(model.dtype).removeprefix("torch.")})


def _resident(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter once, tied ones under their first name, and the buffers that a checkpoint has."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return tensors | {name: value for name, value in model.state_dict().items() if name not in names}


def _stacked(layer: ExpertLayer, experts: LayerWeights) -> dict[str, torch.Tensor]:
    """The experts of one layer as transformers holds them, `[E, ...]`."""
    whole = {
        parameter.full_name: torch.empty(layer.num_experts, *parameter.shape, dtype=parameter.dtype)
        for parameter in layer.parameters
    }
    for expert, weights in experts:
        for parameter in layer.parameters:
            whole[parameter.full_name][expert] = weights[parameter.name]
    return whole


def _write_shard(out: Path, name: str, tensors: dict[str, torch.Tensor], model: Any, weight_map: dict[str, str]) -> int:
    """Write tensors under the names that the checkpoint's family gives them; their bytes."""
    renamed = {key: value.contiguous().clone() for key, value in revert_weight_conversion(model, tensors).items()}
    save_file(renamed, out / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(renamed, name))
    return sum(value.nbytes for value in renamed.values())
