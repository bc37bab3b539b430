"""Checkpoints of any size that take no room: safetensors files of true heads, and holes where the weights would be."""

import json
import struct
from math import prod

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def save_sparse(folder, config, shard_bytes):
    """Write a model of zeros with experts one by one, as they are published, and its index; gives its size in bytes."""
    (folder / "config.json").write_text(json.dumps(config))
    shards, described, end = [], {}, 0
    for name, shape in shapes_of(AutoConfig.for_model(**config)):
        nbytes = 2 * prod(shape)
        if end + nbytes > shard_bytes and described:
            shards.append((described, end))
            described, end = {}, 0
        described[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    shards.append((described, end))
    weight_map = {}
    for number, (tensors, nbytes) in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head = json.dumps(tensors).encode()
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(head)) + head)
            stream.truncate(8 + len(head) + nbytes)
        weight_map |= dict.fromkeys(tensors, file.name)
    total = sum(nbytes for _, nbytes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shapes_of(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, value in model.state_dict().items():
        if ".experts.gate_up_proj" in name:
            for expert in range(value.shape[0]):
                for part in ("gate_proj", "up_proj"):
                    key = name.replace("gate_up_proj", f"{expert}.{part}.weight")
                    yield key, (value.shape[1] // 2, value.shape[2])
        elif ".experts.down_proj" in name:
            for expert in range(value.shape[0]):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), tuple(value.shape[1:])
        else:
            yield name, tuple(value.shape)
