"""Hugging Face checkpoints, the same files as the torch side writes: same keys, same layouts, bit for bit.

In memory, matrices are [input, output] here and [output, input] there; expert weights are [E, D, 2, F] and [E, F, D]
here, [E, 2F, D] and [E, D, F] there.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from ...parts.config import MoEConfig
from ..parts.processes import is_writing, whole_array
from .decoder import MoEForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# an index has some 100 bytes per tensor: half a million tensors
MAX_INDEX_BYTES = 64 << 20


def load_pretrained(folder: str | Path, *, product: str | None = None) -> MoEForCausalLM:
    """A model from a checkpoint of either side, in the dtypes of its files.

    Args:
        folder: a Hugging Face folder with `config.json` and safetensors.
        product: how experts are computed; see `MoEForCausalLM`.

    Raises:
        ValueError: if the folder holds another kind of model, or its tensors do not fit the config.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = nnx.eval_shape(lambda: MoEForCausalLM(config, nnx.Rngs(0), product=product))
    set_tensors(model, read_tensors(folder), source=str(folder))
    return model


def save_pretrained(model: MoEForCausalLM, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; the config last, so that a folder with one is whole.

    Of several processes all call this together, and the first one writes.
    """
    folder = Path(folder)
    tensors = hugging_face_tensors(model)
    if not is_writing():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.architectures = [MoEForCausalLM.__name__]
    config.dtype = str(tensors["model.embed_tokens.weight"].dtype)
    staging = folder / f".{WEIGHTS}.part"
    save_file(tensors, staging, metadata={"format": "pt"})
    os.replace(staging, folder / WEIGHTS)
    config.save_pretrained(folder)


def hugging_face_tensors(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every parameter and buffer by its key in a checkpoint, in the layout of a checkpoint."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        key, array = _outwards(path, whole_array(variable[...]))
        tensors[key] = np.ascontiguousarray(array)
    return tensors


def set_tensors(model: nnx.Module, tensors: dict[str, np.ndarray], *, source: str) -> None:
    """Fill a model, whose variables may be abstract, from tensors by their keys in a checkpoint.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape.
    """
    state = nnx.to_flat_state(nnx.state(model))
    keys = [_key(path) for path, _ in state]
    missing, unknown = sorted(set(keys) - set(tensors)), sorted(set(tensors) - set(keys))
    if getattr(model, "lm_head", None) is None:
        unknown = [key for key in unknown if key != "lm_head.weight"]
    if missing or unknown:
        raise ValueError(f"{source}: {_examples('missing', missing)} {_examples('unknown', unknown)}".strip())
    filled = []
    for key, (path, variable) in zip(keys, state, strict=True):
        array = _inwards(path, tensors[key])
        if array.shape != variable.shape:
            raise ValueError(f"{source}: {key} fits a shape of {array.shape} here; expected {variable.shape}")
        filled.append((path, variable.replace(jnp.asarray(array))))
    nnx.update(model, nnx.from_flat_state(filled))


def read_config(folder: Path) -> MoEConfig:
    """The config of a checkpoint.

    Raises:
        ValueError: if there is none, or it is of another model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; expected a Hugging Face folder")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type != MoEConfig.model_type:
        raise ValueError(f"{folder}: model_type is {model_type!r}; JAX runs {MoEConfig.model_type!r} only")
    return MoEConfig.from_pretrained(folder)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, of one file or of several with an index."""
    tensors = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="np") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS
        return
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder}: neither {WEIGHTS} nor {INDEX}")
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{index}: {index.stat().st_size} bytes; at most {MAX_INDEX_BYTES} are read")
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is not a file name")
        yield folder / name


def _key(path: tuple[str | int, ...]) -> str:
    names = [str(part) for part in path]
    return ".".join([*names[:-1], "weight" if names[-1] == "kernel" else names[-1]])


def _outwards(path: tuple[str | int, ...], array: np.ndarray) -> tuple[str, np.ndarray]:
    if path[-1] == "kernel":
        array = array.T
    elif path[-1] == "gate_up_proj":
        array = rearrange(array, "e d two f -> e (two f) d")
    elif path[-1] == "down_proj":
        array = rearrange(array, "e f d -> e d f")
    return _key(path), array


def _inwards(path: tuple[str | int, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        array = array.T
    elif path[-1] == "gate_up_proj":
        array = rearrange(array, "e (two f) d -> e d two f", two=2)
    elif path[-1] == "down_proj":
        array = rearrange(array, "e d f -> e f d")
    return array


def _examples(what: str, keys: list[str]) -> str:
    return f"{len(keys)} tensors are {what} ({', '.join(keys[:3])});" if keys else ""
