"""Reading safetensors headers by hand: agreement with the library, and every kind of damage."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from offload.checkpoint.tensors import read_checkpoint, read_header, read_tensor


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_reads_what_was_saved(folder, tensors):
    entries = read_checkpoint(folder)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = read_tensor(entries[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_shards(tmp_path, tensors):
    names = list(tensors)
    for shard, part in enumerate((names[:2], names[2:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"s{shard}.safetensors")
    weight_map = {name: f"s{int(position > 1)}.safetensors" for position, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read_checkpoint(tmp_path).keys() == tensors.keys()
    index.write_text(json.dumps({"weight_map": {**weight_map, "more": "s0.safetensors"}}))
    with pytest.raises(ValueError, match="is not in the file"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.weight": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="plain file name"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"s1\.safetensors: missing shard"):
        read_checkpoint(tmp_path)


def test_truncated(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 12, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1]", "must be an object"),
        (b"{nope", "not JSON"),
        (b'{"a": {"dtype": "F32"}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "claims 4 bytes"),
        (b'{"a": {"dtype": "XX", "shape": [2], "data_offsets": [8, 4]}}', "offsets"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', "truncated"),
    ],
)
def test_malformed_headers(tmp_path, header, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_header(file)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match="found neither"):
        read_checkpoint(tmp_path)
