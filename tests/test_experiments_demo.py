import json
from dataclasses import replace

import pytest

from experiments.demo import demo as demo_module
from experiments.demo.demo import run_demo
from experiments.evidence.pages import STYLE
from experiments.train.presets import preset


@pytest.mark.slow
def test_the_whole_story_in_one_page(tmp_path):
    report = run_demo(tmp_path / "demo", train_seconds=60)
    page = report.read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "src=" not in page
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["same_tokens"]
    assert summary["same_logits"]
    assert summary["held_out_bits_per_byte"] < summary["bigram_bits_per_byte"]
    for lru, belady in zip(summary["hit_rates"]["lru"], summary["hit_rates"]["belady"], strict=True):
        assert lru <= belady


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        run_demo(tmp_path)


def test_a_small_demo_says_where_its_numbers_are_from(tmp_path, monkeypatch):
    """The same stages on the smallest preset and a text that a bigram cannot learn by heart and the model can."""
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 1_000)
    small = replace(preset("smoke"), precision="float32", learning_rate=1e-2)
    monkeypatch.setattr(demo_module, "preset", lambda _name: small)
    monkeypatch.setattr(demo_module, "NEW_TOKENS", 8)
    monkeypatch.setattr(demo_module, "OVERTIME", 1e9)
    report = run_demo(tmp_path / "demo", data=str(tmp_path / "fox.txt"), train_seconds=1)
    page = report.read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "src=" not in page
    assert STYLE.strip() in page
    for said in ("<dt>machine</dt>", "<dt>date</dt>", "<dt>versions</dt>", "expertier simulate", "What next"):
        assert said in page
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["same_tokens"]
    assert summary["held_out_bits_per_byte"] < summary["bigram_bits_per_byte"]


def test_a_file_is_no_folder_and_missing_text_is_named_before_anything_starts(tmp_path, run, capfd):
    (tmp_path / "file").write_text("x")
    assert run("demo", "--out", tmp_path / "file") == 2
    assert "is a file; the demo needs a folder" in capfd.readouterr().err
    assert run("demo", "--out", tmp_path / "demo", "--data", tmp_path / "none") == 2
    assert "no such file or folder" in capfd.readouterr().err
    assert not (tmp_path / "demo").exists()
