import json

import pytest

from experiments.demo.demo import run_demo


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
