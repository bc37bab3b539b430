"""The JAX training loop: learns, follows torch step by step, resumes bit by bit, leaves a torch model behind."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("jax", reason="needs the extra expertier[jax]")
pytest.importorskip("optax", reason="needs the extra expertier[jax]")

import jax

from experiments.train import jax_run as train_jax
from experiments.train import torch_run as torch_training
from experiments.train.checkpoint import restore
from experiments.train.corpus import Corpus
from experiments.train.jax_run import train
from experiments.train.metrics import read_log
from experiments.train.run_folder import checkpoints
from moe import MoEForCausalLM
from moe.nnx.model.checkpoint import read_tensors


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    """Two runs of one config compile once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def without_times(run):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_log(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, corpus, precision, optimizer, tiny_training):
    """With jitter and a balancing bias, so that noise and variables are part of what must come back."""
    options = {"router_options": {"bias_rate": 1e-2}, "num_hidden_layers": 1}
    config = replace(tiny_training, precision=precision, optimizer=optimizer, model=tiny_training.model | options)
    train(config, corpus, tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(checkpoints(tmp_path / "cut")[-1])
    assert train(config, corpus, tmp_path / "cut", resume=True, quiet=True).steps == 8
    whole, resumed = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert any("bias_R" in name and whole[name].any() for name in whole)
    for name, array in whole.items():
        assert array.tobytes() == resumed[name].tobytes(), name
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "cut")
    rows = read_log(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_out_bits_per_byte" in row] == [4, 8]


@pytest.mark.slow
def test_from_the_same_weights_it_follows_torch_step_by_step_and_ends_in_a_torch_model(tmp_path, corpus, tiny_training):
    config = replace(
        tiny_training, model=tiny_training.model | {"router": "deepseek_v3", "router_options": {"bias_rate": 1e-2}}
    )
    model, optimizer, order = torch_training.build(config, corpus, torch.device("cpu"))
    model.save_pretrained(tmp_path / "start")
    run = train_jax.build(config, corpus, tmp_path, weights=tmp_path / "start")
    for number in range(6):
        theirs = torch_training.train_step(model, optimizer, order, config, number)
        ours = run.step(number)
        assert ours.keys() == theirs.keys()
        for name in ("loss", "lm_loss", "gradient_norm", "router_entropy", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (number, name)
        assert np.abs(np.array(ours["load"]) - theirs["load"]).max() < 0.03
    assert run.evaluate() == pytest.approx(torch_training.evaluate(model, corpus, config), rel=1e-4)
    final = run.save(6)
    with pytest.raises(ValueError, match="not trained by torch"):
        restore(final, model, optimizer)
    loaded = MoEForCausalLM.from_pretrained(final)
    assert torch_training.evaluate(loaded, corpus, config) == pytest.approx(run.evaluate(), rel=1e-5)


@pytest.mark.slow
def test_training_learns(tmp_path, tiny_training):
    text = np.frombuffer(b"abcdefgh" * 2_000, np.uint8)
    corpus = Corpus(train=text, held_out=text[:500], vocab_size=256, tokens_per_byte=1.0, source="cycle")
    config = replace(tiny_training, model=tiny_training.model | {"vocab_size": 256}, steps=60, learning_rate=1e-2)
    assert train(config, corpus, tmp_path / "run", quiet=True).held_out_bits_per_byte < 0.5


def test_a_run_of_torch_is_not_resumed(tmp_path, corpus, tiny_training):
    short = replace(tiny_training, steps=1, model=tiny_training.model | {"num_hidden_layers": 1})
    torch_training.train(short, corpus, tmp_path / "torch", quiet=True)
    with pytest.raises(ValueError, match="not trained by JAX"):
        train(short, corpus, tmp_path / "torch", resume=True, quiet=True)
