"""Checkpoints of any size from a config alone: of random weights, or of holes, which take no room on a disk.

Names, shapes, heads and the index are those of a published model with experts one by one. Where the config names blocks
of quantised weights, matrices are codes with scales beside them.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from routing.ground.files import write_json

if TYPE_CHECKING:
    import torch

POOL_ELEMENTS = 1 << 24
"""Of random numbers, 32 MiB: drawing all weights of several GB takes a minute. The pool is taken from an odd place on,
tensor by tensor, so that no two matrices are alike."""
STRIDE = 7_919_011
"""By which the next tensor's place in the pool differs: a prime."""
SPREAD = 0.02
"""Standard deviation of weights, transformers' usual initialisation."""
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""
ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
"""Of the safetensors dtypes that are written."""
ALIGNMENT = 8
"""Of the first tensor in a file, as the safetensors library has it."""


class Generated(NamedTuple):
    """What was written."""

    nbytes: int
    tensors: int
    shards: int


def save_generated(folder: Path, config: Mapping[str, Any], shard_bytes: int, *, seed: int | None = None) -> Generated:
    """Write a model and its index.

    Args:
        folder: where it goes; created if needed.
        config: of a model that transformers knows, with `model_type`.
        shard_bytes: of a shard, at most, unless one tensor is larger.
        seed: of random weights in bfloat16; None leaves holes, which read as zeros.

    Raises:
        ValueError: if random weights should be codes.
    """
    if seed is not None and "quantization_config" in config:
        raise ValueError("random bytes are no codes with scales; leave the seed or quantization_config out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    shards = list(_shards(tensors_of(config), shard_bytes))
    pool = None if seed is None else _pool(seed)
    weight_map = dict[str, str]()
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, tensors, pool, first=len(weight_map))
        weight_map |= dict.fromkeys(tensors, name)
    nbytes = sum(map(_nbytes, (each for tensors in shards for each in tensors.values())))
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return Generated(nbytes, len(weight_map), len(shards))


def checkpoint_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of all tensors that `save_generated` would write."""
    return sum(map(_nbytes, tensors_of(config).values()))


def tensors_of(config: Mapping[str, Any]) -> Tensors:
    """All tensors of a checkpoint, fused experts as one matrix each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    block = config.get("quantization_config", {}).get("weight_block_size")
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    found: Tensors = {}
    for full_name, value in model.state_dict().items():
        for name, shape in () if full_name in tied else _separate(full_name, tuple(value.shape)):
            is_code = block is not None and name.endswith("_proj.weight")
            found[name] = ("F8_E4M3" if is_code else "BF16", shape)
            if is_code:
                grid = tuple(-(-length // size) for length, size in zip(shape, block, strict=True))
                found[f"{name}_scale_inv"] = ("F32", grid)
    return found


def _separate(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that a published checkpoint has for one of a model's."""
    bank = next((part for part in ("gate_up_proj", "down_proj") if name.endswith(f".experts.{part}")), None)
    if bank is None:
        yield name, shape
        return
    count, rows, columns = shape
    parts = ("gate_proj", "up_proj") if bank == "gate_up_proj" else (bank,)
    for expert in range(count):
        for part in parts:
            yield name.replace(bank, f"{expert}.{part}.weight"), (rows // len(parts), columns)


def _nbytes(described: tuple[str, tuple[int, ...]]) -> int:
    return ITEM_BYTES[described[0]] * prod(described[1])


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[Tensors]:
    shard, filled = Tensors(), 0
    for name, described in tensors.items():
        if shard and filled + _nbytes(described) > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = described
        filled += _nbytes(described)
    yield shard


def _write_shard(file: Path, tensors: Tensors, pool: "torch.Tensor | None", first: int) -> None:
    head, end = {}, 0
    for name, described in tensors.items():
        begin, end = end, end + _nbytes(described)
        head[name] = {"dtype": described[0], "shape": described[1], "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        if pool is None:
            stream.truncate(8 + len(text) + end)
            return
        for number, (_, shape) in enumerate(tensors.values(), first):
            for piece in _drawn(pool, shape, number):
                stream.write(memoryview(piece.numpy()))


def _pool(seed: int) -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.empty(POOL_ELEMENTS, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=generator)


def _drawn(pool: "torch.Tensor", shape: tuple[int, ...], number: int) -> "Iterator[torch.Tensor]":
    """The bytes of a tensor, in pieces; vectors are the weights of norms."""
    import torch

    left, place = prod(shape), number * STRIDE % len(pool)
    if len(shape) < 2:
        yield torch.ones(left, dtype=torch.bfloat16).view(torch.uint8)
        return
    while left:
        piece = pool[place : place + left]
        yield piece.view(torch.uint8)
        left, place = left - len(piece), 0
