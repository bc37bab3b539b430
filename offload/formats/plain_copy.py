"""`offload.dequantise`: the plain checkpoint that a quantised one, or a dense GGUF file, stands for."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from routing.ground.expect import expect_new
from routing.ground.safetensors_head import safetensors_head

from ..checkpoint.gguf.head import has_config_file, is_gguf
from ..checkpoint.gguf.model import GgufModel, generation_config, open_gguf_model
from ..checkpoint.gguf.tensors import GgufTensor
from ..checkpoint.gguf.text import tokenizer_of
from ..checkpoint.location import SMALL_FILES, local_folder
from ..checkpoint.quantised.plain_copy import SHARD_BYTES
from ..checkpoint.quantised.plain_copy import dequantise as dequantise_folder
from ..checkpoint.weight_files import ONLY_NAME
from .gguf_blocks.expand import expand_tensor

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def dequantise(
    path_or_id: str | Path,
    out: Path,
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the plain checkpoint that a quantised one stands for; it needs no quantisation library.

    Args:
        path_or_id: a folder with safetensors weights, a GGUF file of a dense model, or a model id.
        out: the folder to write; must not exist.
        dtype: what weights are rounded to: `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"`, the config's.
        shard_bytes: size of a file at most; a dense GGUF model becomes one file.
        progress: told after each matrix how many bytes are written, and how many there are.

    Returns:
        `out`.

    Raises:
        ValueError: if nothing is quantised, the checkpoint is damaged, a GGUF file has experts, or `out` exists.
    """
    expect_new(out)
    place = local_folder(path_or_id)
    if not is_gguf(place):
        return dequantise_folder(place, out, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
    opened = open_gguf_model(place, dtype)
    if opened.names.experts:
        raise ValueError(
            f"model {place}: it has experts, which are read in place; only dense GGUF models are written as plain ones"
        )
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as staging:
        folder = Path(staging) / "checkpoint"
        folder.mkdir()
        _write_weights(opened, folder / ONLY_NAME, progress)
        _write_text(opened, folder)
        opened.skeleton.config.save_pretrained(folder)
        generation_config(opened).save_pretrained(folder)
        folder.rename(out)
    return out


def _write_weights(opened: GgufModel, file: Path, progress: Callable[[int, int], None]) -> None:
    """One tensor in memory at a time."""
    dtype = opened.skeleton.dtype
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32; got {dtype}")
    shapes = {name: tuple(opened.skeleton.state_dict()[name].shape) for name in opened.names.dense}
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    done = 0
    with file.open("wb") as stream:
        stream.write(safetensors_head((name, DTYPE_NAMES[dtype], shapes[name], sizes[name]) for name in shapes))
        for name, tensor in _tensors(opened, shapes, dtype):
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            done += sizes[name]
            progress(done, sum(sizes.values()))


def _tensors(opened: GgufModel, shapes: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    change = opened.change
    for name, entries in opened.names.dense.items():
        yield name, GgufTensor(entries, shapes[name], dtype, change, expand_tensor)[...].to(dtype)


def _write_text(opened: GgufModel, folder: Path) -> None:
    """The tokenizer's files that lie beside the model, or the tokenizer in it."""
    file = opened.head.file
    if not has_config_file(file):
        tokenizer_of(opened.head).save_pretrained(folder)
        return
    for pattern in SMALL_FILES:
        for found in file.parent.glob(pattern):
            shutil.copyfile(found, folder / found.name)
