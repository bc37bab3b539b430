"""Heads of GGUF files: what the reader of the `gguf` package finds in whole ones, and clear refusals of all others."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.checkpoint.gguf.head import gguf_in, part_files, read_gguf
from offload.checkpoint.location import local_folder, local_name

U32, U64, TEXT = "<I", "<Q", 8


def text(value):
    return struct.pack(U64, len(value)) + value.encode()


def head(tensors=(), values=(), *, magic=b"GGUF", version=3, num_tensors=None, num_values=None):
    """A head made byte by byte of tensors (name, lengths fastest first, type, offset) and values (key, type, bytes)."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(values) if num_values is None else num_values)
    data = magic + struct.pack(U32, version) + struct.pack("<QQ", *counts)
    for key, kind, value in values:
        data += text(key) + struct.pack(U32, kind) + value
    for name, lengths, kind, offset in tensors:
        data += text(name) + struct.pack(U32, len(lengths))
        data += b"".join(struct.pack(U64, length) for length in lengths) + struct.pack("<IQ", kind, offset)
    return data


ARCHITECTURE = ("general.architecture", TEXT, text("llama"))
F32, Q8_0 = 0, 8


def whole(tensors, values=(ARCHITECTURE,), data_bytes=4096, **others):
    made = head(tensors, values, **others)
    return made.ljust(-(-len(made) // 32) * 32, b"\0") + bytes(data_bytes)


def written(folder, name="model.gguf", **writing):
    """A file with tensors of several types by the package's own writer."""
    writer, rng = gguf.GGUFWriter(folder / name, "qwen3moe", **writing), np.random.default_rng(0)
    writer.add_uint32("qwen3moe.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for number, (kind, shape) in enumerate(
        [("F32", (7,)), ("Q4_1", (5, 64)), ("MXFP4", (3, 4, 32)), ("F16", (3, 2)), ("Q8_0", (2, 32))]
    ):
        values = rng.normal(size=shape).astype(np.float32)
        stored = values if kind == "F32" else gguf.quants.quantize(values, Kind[kind])
        writer.add_tensor(f"blk.{number}.weight", stored, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / name


def test_finds_what_the_reader_of_the_package_finds(tmp_path):
    file = written(tmp_path)
    found, expected = read_gguf(file), gguf.GGUFReader(file)
    assert found.architecture == "qwen3moe"
    assert found.own("block_count") == 2
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "é"]
    assert found.metadata["tokenizer.ggml.scores"].tolist() == [0.5, 1.5]
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    assert len(found.entries) == len(expected.tensors) == 5
    for tensor in expected.tensors:
        entry = found.entries[tensor.name]
        assert (entry.offset, entry.nbytes, entry.dtype) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )
        assert list(entry.shape) == tensor.shape.tolist()[::-1]


def test_split_files_are_joined_whichever_is_given(tmp_path):
    alone = read_gguf(written(tmp_path, "alone.gguf"))
    written(tmp_path, "model.gguf", split_max_tensors=2)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    for given_part in parts:
        found = read_gguf(given_part)
        assert {name: (entry.nbytes, entry.shape) for name, entry in found.entries.items()} == {
            name: (entry.nbytes, entry.shape) for name, entry in alone.entries.items()
        }
        for name, entry in found.entries.items():
            before = alone.entries[name]
            assert (
                entry.file.read_bytes()[entry.offset :][: entry.nbytes]
                == (before.file.read_bytes()[before.offset :][: before.nbytes])
            )
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf: no such file; copy it beside the others"):
        read_gguf(parts[0])


def test_parts_that_belong_to_other_models_are_refused(tmp_path):
    written(tmp_path, "model.gguf", split_max_tensors=2)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: not part 2 of 3 by its metadata"):
        read_gguf(parts[0])
    parts[1].write_bytes(second)
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="one of 3 files by its metadata, and 1 by its name"):
        read_gguf(renamed)


FAULTS = {
    "not a GGUF file": whole([], magic=b"GGML"),
    "big-endian": head([], [], version=3 << 24),
    "this is version 1": head([], [], version=1),
    "does not name its architecture": whole([], values=()),
    "1000000000000 tensors cannot be in": whole([], num_tensors=10**12),
    "1000000000000 values cannot be in": whole([], num_values=10**12),
    "1 bytes cannot be in the 2 bytes that are left|5 bytes": head([], [ARCHITECTURE])[:-3],
    "more than 1024": whole([], [(" " * 2000, TEXT, text(""))]),
    "bytes cannot be in": whole([], [("a", TEXT, struct.pack(U64, 1 << 60))]),
    "texts cannot be in": whole([], [("a", 9, struct.pack("<IQ", TEXT, 1 << 60))]),
    "numbers cannot be in": whole([], [("a", 9, struct.pack("<IQ", 4, 1 << 60))]),
    "a list of values of type 9": whole([], [("a", 9, struct.pack("<IQ", 9, 1))]),
    "a value of unknown type 77": whole([], [("a", 77, b"")]),
    "is not UTF-8": whole([], [("a", TEXT, struct.pack(U64, 2) + b"\xff\xfe")]),
    "the metadata has general.architecture twice": whole([], [ARCHITECTURE, ARCHITECTURE]),
    "must be a power of 2": whole([], [ARCHITECTURE, ("general.alignment", 4, struct.pack(U32, 48))]),
    "has 0 axes": whole([("a", (), F32, 0)]),
    "has 9 axes": whole([("a", (1,) * 9, F32, 0)]),
    "cannot be in blocks of 32 columns": whole([("a", (48, 2), Q8_0, 0)]),
    "cannot be in blocks of 1 columns": whole([("a", (0, 2), F32, 0)]),
    "stored as type 5": whole([("a", (32,), 5, 0)]),
    "no multiple of 32": whole([("a", (8,), F32, 8)]),
    "tensors a and b overlap": whole([("a", (16,), F32, 0), ("b", (16,), F32, 32)]),
    "tensor a is there twice": whole([("a", (8,), F32, 0), ("a", (8,), F32, 32)]),
    "truncated: tensor a ends at byte": whole([("a", (4096,), F32, 0)]),
    "ends at byte 18446744073709": whole([("a", (1 << 32, 1 << 30), F32, 0)]),
}


@pytest.mark.parametrize("message", FAULTS)
def test_damaged_heads_are_refused_by_a_line_that_names_the_file(tmp_path, message):
    file = tmp_path / "bad.gguf"
    file.write_bytes(FAULTS[message])
    with pytest.raises(ValueError, match=message) as refused:
        read_gguf(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return written(tmp_path_factory.mktemp("good"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_of_the_head_is_read_or_refused(good, tmp_path_factory, data):
    """No flipped byte and no cut end brings anything but a whole answer or one line."""
    content = bytearray(good.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for place in data.draw(st.lists(st.integers(0, min(700, len(content) - 1)), max_size=3)) if content else ():
        content[place] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("changed") / "changed.gguf"
    file.write_bytes(content)
    try:
        found = read_gguf(file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017
    else:
        assert all(entry.offset + entry.nbytes <= len(content) for entry in found.entries.values())


def test_a_folder_stands_for_its_only_gguf_model(tmp_path):
    assert gguf_in(tmp_path) is None
    file = written(tmp_path)
    assert local_name(file) == file
    assert local_folder(file) == local_folder(tmp_path) == file
    written(tmp_path, "other.gguf", split_max_tensors=2)
    with pytest.raises(ValueError, match=r"several GGUF files \(model.gguf, other-00001-of-00003.gguf\)"):
        local_folder(tmp_path)
    file.unlink()
    first = tmp_path / "other-00001-of-00003.gguf"
    assert local_folder(tmp_path) == first
    first.unlink()
    with pytest.raises(ValueError, match=r"the first file beside other-00002-of-00003\.gguf is missing"):
        local_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert local_folder(tmp_path) == tmp_path


def test_no_other_file_is_a_model(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="a file, but no GGUF file"):
        local_name(tmp_path / "model.bin")


def test_a_part_of_no_model(tmp_path):
    with pytest.raises(ValueError, match="a model of 0 files"):
        part_files(tmp_path / "model-00001-of-00000.gguf")
