"""Source: the tensors of a checkpoint under the names that transformers' model gives them, read one at a time."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..model.decoder import MoEForCausalLM
from .families import config_of_moe
from .opening import read_config

ONLY_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
NOT_WEIGHTS = ("rotary_emb.inv_freq",)


class Source:
    """A checkpoint folder; nothing is kept in memory but the names.

    Args:
        folder: holds safetensors files.
        skeleton: the model that the checkpoint is of, on the meta device; gives names and conversions.

    Raises:
        ValueError: if files are missing or damaged, or a tensor of the model or of the checkpoint has no counterpart.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel) -> None:
        self._skeleton = skeleton
        self._file_of_key = files_of_tensors(folder)
        mapping = get_model_conversion_mapping(skeleton)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        expected = skeleton.state_dict()
        self._shapes = {name: value.shape for name, value in expected.items()}
        self._keys: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for key in sorted(self._file_of_key, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, expected)
            if name not in expected and key in expected:
                name, pattern = key, None
            self._keys[name].append((key, pattern))
        self._expect(folder, set(expected))

    def read(self, name: str) -> Tensor:
        """The tensor that the model calls `name`, converted as transformers would."""
        keys = self._keys[name]
        if keys[0][1] is None:
            return self._shaped(name, self._tensor(keys[0][0]))
        converter = self._converters[keys[0][1]]
        collected: dict[str, Any] = defaultdict(list)
        for key, pattern in keys:
            assert pattern is not None
            collected[pattern].append(self._tensor(key))
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=self._skeleton,
                config=self._skeleton.config,
                missing_keys=None,
            )
        found = next(value for target, value in collected.items() if target in name)
        return self._shaped(name, found[0] if isinstance(found, list) else found)

    def _shaped(self, name: str, tensor: Tensor) -> Tensor:
        want = self._shapes[name]
        if tensor.shape != want:
            raise ValueError(f"{name} has shape {list(tensor.shape)} in the checkpoint; the model wants {list(want)}")
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def _tensor(self, key: str) -> Tensor:
        return read_tensor(self._file_of_key[key], key)

    def _expect(self, folder: Path, expected: set[str]) -> None:
        extra = [key for name in self._keys.keys() - expected for key, _ in self._keys[name]]
        extra = sorted(key for key in extra if not key.endswith(NOT_WEIGHTS))
        if extra:
            raise ValueError(f"{folder}: {len(extra)} tensors have no place in the model, the first is {extra[0]}")
        tied = set(self._skeleton.all_tied_weights_keys) if self._skeleton.config.tie_word_embeddings else set()
        if missing := sorted(expected - self._keys.keys() - tied):
            raise ValueError(f"{folder}: the checkpoint has no tensor for {missing[0]}; is a shard missing?")


class OurSource:
    """A mixture-of-experts checkpoint under the names of our decoder, whichever family wrote it.

    Args:
        folder: a checkpoint of ours, or an `olmoe`, `qwen3_moe` or `mixtral` one.

    Raises:
        ValueError: if our decoder cannot express the model, or files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        native = read_config(folder)
        self.folder, self.config = folder, config_of_moe(native)
        self.is_ours = native.model_type == self.config.model_type
        model_class = MoEForCausalLM if self.is_ours else AutoModelForCausalLM._model_mapping[type(native)]
        skeleton = meta_model(MoEForCausalLM, self.config)
        self.shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        self._source = Source(folder, skeleton if self.is_ours else meta_model(model_class, native))

    def __contains__(self, name: str) -> bool:
        return self._theirs(name) in self._source

    def read(self, name: str) -> Tensor:
        """The tensor that our decoder calls `name`."""
        return self._source.read(self._theirs(name))

    def resident(self) -> dict[str, Tensor]:
        """Every tensor that belongs to no expert, but tied ones that the checkpoint does not hold."""
        return {name: self.read(name) for name in self.shapes if ".mlp.experts." not in name and name in self}

    def experts_prefix(self, layer: int) -> str:
        """What precedes the names of the experts of a MoE layer."""
        return f"model.layers.{self.config.num_dense_layers + layer}.mlp.experts."

    def experts(self, layer: int) -> dict[str, Tensor]:
        """The plain experts of a MoE layer, by their names there."""
        return {name: self.read(self.experts_prefix(layer) + name) for name in ("gate_up_proj", "down_proj")}

    def _theirs(self, name: str) -> str:
        return name if self.is_ours else name.replace(".mlp.router.", ".mlp.gate.")


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor of a safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """Checkpoint key -> file: of one file if it is there, whatever an index beside it says, as in transformers.

    Raises:
        ValueError: if a file is missing, damaged, or not where it should be.
    """
    index = folder / INDEX_NAME
    names = [ONLY_NAME]
    if index.is_file() and not (folder / ONLY_NAME).is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error}") from error
    found: dict[str, Path] = {}
    for name in names:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(
                f"{folder}: found no {name}; the weights must be safetensors (save_pretrained writes them)"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        except SafetensorError as error:
            raise ValueError(f"{file}: not a safetensors file, or truncated: {error}") from error
    return found


def meta_model(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return model_class(config)
