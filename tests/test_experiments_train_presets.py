"""Contracts over the tables: every preset builds and is as large as the docs say, every variant takes a step."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.compare.summary import METRICS
from experiments.train.corpus import Corpus
from experiments.train.fitting import fitting_model, preset_sizes, preset_table
from experiments.train.metrics import read_log
from experiments.train.presets import PRESETS, preset
from experiments.train.schedule import learning_rate
from experiments.train.torch_run import build, evaluate, train, train_step
from experiments.variants.architectures import ARCHITECTURE_VARIANTS
from experiments.variants.catalogue import VARIANTS
from moe import MoEConfig, MoEForCausalLM

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
EVERY_VARIANT = [*VARIANTS, *ARCHITECTURE_VARIANTS]


@pytest.fixture
def byte_corpus():
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 200, np.uint8)
    return Corpus(train=text, held_out=text[:900], vocab_size=256, tokens_per_byte=1.0, source="fox")


@pytest.fixture
def smallest():
    """Narrow layers of sixteen experts, top-2: the preset `routers` in small."""
    base = preset("routers")
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = base.model | sizes | {"head_dim": 16, "num_hidden_layers": 4, "num_experts_per_tok": 2}
    return replace(base, model=model, steps=2, batch_size=2, sequence_length=32, held_out_tokens=64, warmup_steps=1)


def test_the_page_has_the_table_of_presets_as_they_are():
    assert preset_table() in PAGE


@pytest.mark.parametrize("name", ["smoke", "routers", "chains"])
def test_sizes_are_those_of_a_model_that_was_built(name):
    model = MoEForCausalLM(MoEConfig(**preset(name).model))
    sizes = preset_sizes(name)
    assert sizes["parameters"] == sum(p.numel() for p in model.parameters())
    config = model.config
    idle = config.num_experts - config.num_experts_per_tok
    unvisited = config.num_moe_layers * idle * 3 * config.hidden_size * config.moe_intermediate_size
    assert sizes["active_parameters"] == sizes["parameters"] - unvisited


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_its_schedule_rises_and_falls(name):
    config = preset(name)
    with torch.device("meta"):
        MoEForCausalLM(MoEConfig(**config.model))
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert max(rates) == pytest.approx(config.learning_rate)
    assert rates[: config.warmup_steps] == sorted(rates[: config.warmup_steps])
    after = rates[config.warmup_steps :]
    assert after == sorted(after, reverse=True)
    assert config.min_learning_rate <= after[-1] < 0.2 * config.learning_rate
    assert config.evaluate_every <= config.steps
    assert config.checkpoint_every <= config.steps


@pytest.mark.parametrize("name", EVERY_VARIANT)
def test_every_variants_first_step_is_finite_and_moves_the_weights(name, smallest, byte_corpus):
    # recursion keeps the first and the last layer to themselves: 2 + 2 * 1, or 2 + 3 * 2
    depth = {"num_hidden_layers": 8 if name.endswith("-3") else 4}
    config = replace(smallest, model=fitting_model(name, smallest.model | depth))
    model, optimizer, order = build(config, byte_corpus, torch.device("cpu"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    row = train_step(model, optimizer, order, config, 0)
    numbers = [value for value in row.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), row
    assert row["lm_loss"] == pytest.approx(math.log(256), rel=0.2)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert 0 < evaluate(model, byte_corpus, config) < 16


@pytest.mark.parametrize("name", EVERY_VARIANT)
def test_every_variant_fits_the_preset_that_compares_it(name):
    fits = [other for other in PRESETS if _fits(name, other)]
    assert fits, f"{name} fits no preset"


def _fits(name, other):
    try:
        fitting_model(name, preset(other).model)
    except ValueError as error:
        assert str(error).startswith(f"{name}: ")  # noqa: PT017
        return False
    return True


def test_the_page_explains_every_key_of_the_metrics_and_every_column(tmp_path, corpus, tiny_training):
    train(tiny_training, corpus, tmp_path / "run", quiet=True)
    keys = {key for row in read_log(tmp_path / "run/metrics.jsonl") for key in row}
    explained = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert keys <= explained
    assert explained - keys <= set(PRESETS), "a key that no run has"
    for metric in METRICS.values():
        assert f"| {metric.label} | {metric.meaning} |" in PAGE


def test_the_python_on_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text.txt").write_text("import math\n\nprint(math.pi)\n" * 300)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    scope = {}
    for block in blocks:
        exec(block, scope)
    printed = capsys.readouterr().out
    assert 0 < float(printed.splitlines()[0]) < 8
    assert "import " in printed
