"""A tokenizer's files are data: nothing in the folder runs, and nobody is asked at the terminal."""

import json

import pytest

from experiments.train.text.tokens import Encoder
from moe import open_tokenizer, save_byte_tokenizer, text_of
from moe.parts.text import token_rows

CODE = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}


def _with_code(folder):
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(CODE))
    (folder / "code.py").write_text("raise SystemExit('the code has run')")
    (folder / "config.json").write_text('{"model_type": "expertier", "vocab_size": 300}')
    return folder


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    def ask(*_):
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize(
    "read",
    [
        open_tokenizer,
        lambda folder: text_of(folder, 300),
        lambda folder: Encoder(str(folder)),
        lambda folder: token_rows(folder, 300, [folder / "code.py"], 8, 64),
    ],
)
def test_code_in_the_folder_is_never_run(tmp_path, read):
    with pytest.raises(ValueError, match="Python code in the folder, which is never run") as refused:
        read(_with_code(tmp_path / "own"))
    assert len(str(refused.value).splitlines()) == 1


def test_files_beside_code_are_read_without_it(tmp_path):
    folder = _with_code(tmp_path / "own")
    save_byte_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(CODE | settings))
    assert text_of(folder, 300).encode("aé") == [97, 195, 169]
    assert Encoder(str(folder / "tokenizer.json"))(b"a")[0].tolist() == [97, 0]


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', "[]", ""])
def test_damaged_files_are_refused_in_one_line(tmp_path, content):
    save_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    for read in (open_tokenizer, lambda folder: Encoder(str(folder))):
        with pytest.raises(ValueError, match="its tokenizer cannot be read") as refused:
            read(tmp_path)
        assert len(str(refused.value).splitlines()) == 1
