"""Ways of running a model, ranked by the speed to expect on a machine of known rates."""

import json
from pathlib import Path

import pytest

from experiments.evidence.generated import save_generated
from offload.forecast.fit import fit
from offload.forecast.variants import variants_of
from routing.ground.hardware import Hardware

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 8192,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
EXPERTS = 4 * 64 * 3 * 512 * 8192 * 2
RATES = {
    "disk_bytes_per_s": 2e8,
    "cached_bytes_per_s": 5e9,
    "memory_bytes_per_s": 25e9,
    "exact_bytes_per_s": 15e9,
    "fast_bytes_per_s": 22e9,
    "layer_s": 0.0002,
}


@pytest.fixture(autouse=True)
def _small_process(monkeypatch):
    """What earlier tests have left in this process is no part of a budget here."""
    monkeypatch.setattr("offload.runtime.opening.resident_bytes", lambda: 300 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    save_generated(place, CONFIG, shard_bytes=10**9)
    return place


def found(folder, budget, **rates):
    return variants_of(fit(folder, cpu_memory=budget), Hardware(**{**RATES, **rates}))


def test_a_range_holds_what_is_expected_and_rises_with_memory(folder):
    small, large = (found(folder, budget)[0] for budget in ("3GiB", "5GiB"))
    for each in (small, large):
        assert each.least <= each.expected <= each.most
        assert each.expert_bytes == EXPERTS
        assert each.binds == "disk"
    assert small.expected < large.expected
    assert 0 < small.share < large.share < 1
    assert small.least < large.least
    assert small.most < large.most


def test_with_all_experts_in_memory_there_is_one_speed(folder):
    (first, second) = found(folder, "64GiB")
    assert [each.share for each in (first, second)] == [1, 1]
    assert first.options == "--arithmetic fast"
    assert first.least == first.expected == pytest.approx(first.most)
    assert first.binds == "memory"


def test_the_budget_that_holds_everything_is_told_beside_a_smaller_one(folder):
    fitted = fit(folder, cpu_memory="3GiB")
    last = variants_of(fitted, Hardware(**RATES))[-1]
    assert last.what == "all experts in memory"
    assert last.share == 1
    assert last.budget_bytes == fitted.budgets.all_bytes


def test_a_compressed_copy_wins_where_the_disk_binds_and_loses_where_memory_does(folder):
    slow = found(folder, "3GiB", compressed_bytes_per_s=9e9)
    assert slow[0].what == "compressed copy"
    assert 0.6 * EXPERTS < slow[0].expert_bytes < 0.8 * EXPERTS
    assert slow[0].share > slow[1].share
    quick = found(folder, "64GiB", compressed_bytes_per_s=9e9)
    assert quick[-1].what == "compressed copy"


def test_fit_tells_them(folder, tmp_path, run, capsys):
    rates, report = tmp_path / "rates.toml", tmp_path / "report.json"
    Hardware(**RATES, compressed_bytes_per_s=9e9).save(rates)
    assert run("fit", folder, "--cpu-memory", "3GiB", "--hardware", rates, "--json", report) == 0
    shown = capsys.readouterr().out
    assert "stay in RAM and" in shown
    assert "quickest within 3.00 GiB: compressed copy" in shown
    told = json.loads(Path(report).read_text())["variants"]
    assert told[0]["what"] == "compressed copy"
    assert all(each["least"] <= each["expected"] <= each["most"] for each in told)
    assert run("fit", folder, "--cpu-memory", "3GiB") == 0
    assert "add --hardware FILE of `expertier calibrate`" in capsys.readouterr().out
