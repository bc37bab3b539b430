"""Compiled C without a home folder, and with one that is read-only: it works, and nobody else's library is loaded."""

import os
from pathlib import Path

import pytest

from routing.ground import c_library
from routing.ground.c_library import compile_library

SOURCE = "int answer(void) { return %d; }\n"


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answer.c"
    file.write_text(SOURCE % 42)
    return file


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    c_library._own_folder.cache_clear()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(c_library.tempfile, "tempdir", None)
    yield
    c_library._own_folder.cache_clear()


def no_home(monkeypatch):
    def refuse():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(c_library.Path, "home", refuse)


def test_a_user_without_a_home_folder(source, monkeypatch, tmp_path):
    no_home(monkeypatch)
    assert compile_library([source]).answer() == 42
    (made,) = tmp_path.glob("expertier-*")
    assert made.stat().st_mode & 0o077 == 0
    source.write_text(SOURCE % 43)
    assert compile_library([source]).answer() == 43
    assert len(list(made.glob("native-*.so"))) == 2


def test_a_folder_that_cannot_be_made(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_library([source]).answer() == 42


def test_a_read_only_folder_is_read_and_not_written(source, monkeypatch, tmp_path):
    kept = tmp_path / "cache" / "expertier"
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parent))
    assert compile_library([source]).answer() == 42
    (library,) = kept.glob("native-*.so")
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(c_library.os, "access", lambda folder, mode: Path(folder) != kept)
    assert compile_library([source]).answer() == 42
    source.write_text(SOURCE % 44)
    assert compile_library([source]).answer() == 44
    assert [*kept.glob("native-*.so")] == [library]
    assert library.stat().st_mtime_ns == written


def test_an_empty_variable_is_none(source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert compile_library([source]).answer() == 42
    assert list((tmp_path / "home/.cache/expertier").glob("native-*.so"))
    assert not os.path.exists("expertier")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("this is no C", "could not be compiled"),
        ("int missing(void);\nint answer(void) { return missing(); }", "undefined symbol"),
    ],
)
def test_what_failed_once_is_not_compiled_again(source, monkeypatch, text, said):
    """Neither what does not compile nor what cannot be loaded; other sources are."""
    calls, run = [], c_library._run
    monkeypatch.setattr(c_library, "_run", lambda command: (calls.append(command), run(command)))
    source.write_text(text)
    with pytest.raises(OSError, match=said) as first:
        compile_library([source])
    tried = len(calls)
    with pytest.raises(OSError, match=said) as again:
        compile_library([source])
    assert str(again.value) == str(first.value)
    assert len(calls) == tried
    source.write_text(SOURCE % 45)
    assert compile_library([source]).answer() == 45


def test_tiles_of_a_user_without_a_home_folder(monkeypatch):
    tuned = pytest.importorskip("moe.kernels.launching.tuned")
    no_home(monkeypatch)
    tuned.tuned_tiles.cache_clear()
    assert tuned.tuned_tiles("a device") == {}
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        tuned.tuned_file("a device")
    tuned.tuned_tiles.cache_clear()
