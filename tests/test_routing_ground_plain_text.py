"""Files that are no text are refused by their first bytes wherever a text is asked for."""

import bz2
import codecs
import gzip
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe import ByteText, save_byte_tokenizer
from moe.parts.text import token_rows
from offload.serve.corpus import sequences
from routing.ground.plain_text import expect_plain_text

TEXT = "A text with some words in it. " * 40


def _zstd(data):
    with pa.BufferOutputStream() as sink:
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()


def _table(file):
    pyarrow.parquet.write_table(pa.table({"text": [TEXT]}), file)


FILES = {
    "gzip": lambda file: file.write_bytes(gzip.compress(TEXT.encode())),
    "bzip2": lambda file: file.write_bytes(bz2.compress(TEXT.encode())),
    "xz": lambda file: file.write_bytes(lzma.compress(TEXT.encode())),
    "zstd": lambda file: file.write_bytes(_zstd(TEXT.encode())),
    "a Parquet table": _table,
    "a zip archive": lambda file: file.write_bytes(b"PK\x03\x04" + TEXT.encode()),
    "UTF-16 or UTF-32": lambda file: file.write_bytes(TEXT.encode("utf-16")),
    "zero bytes": lambda file: file.write_bytes(b"\x01\x02\0" * 100),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_text_is_refused(kind, tmp_path):
    file = tmp_path / "text.txt"
    FILES[kind](file)
    save_byte_tokenizer(tmp_path)
    for read in (
        lambda: expect_plain_text(file),
        lambda: token_rows(tmp_path, 256, [file], 16, 64),
        lambda: next(sequences(file, ByteText(), 16, 64)),
        lambda: next(sequences(tmp_path, ByteText(), 16, 64)),
    ):
        with pytest.raises(ValueError, match=kind):
            read()


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_text_is_read_without_its_mark(mark, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(mark + TEXT.encode())
    expected = list(TEXT.encode())
    assert token_rows(tmp_path, 256, [file], 16, 64).flatten().tolist() == expected[:64]
    assert [token for one in sequences(file, ByteText(), 16, 64) for token in one] == expected[:64]


def test_an_empty_file_and_one_in_another_language_are_text(tmp_path):
    for content in (b"", "日本語のテキスト".encode(), "naïve".encode("latin-1")):
        (tmp_path / "t").write_bytes(content)
        expect_plain_text(tmp_path / "t")
