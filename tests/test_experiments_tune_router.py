"""`expertier tune-router`: gates alone change, reuse rises, a resumed run is the same run, the report adds up."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from experiments.evidence.locality import locality_of
from experiments.train.presets import TrainConfig
from experiments.tune_router.tuning import TuneOptions, _Tuning, text_for, tune_router
from moe import MoEForCausalLM
from routing import RoutingTrace

RUN = TrainConfig(
    steps=12,
    batch_size=2,
    sequence_length=32,
    learning_rate=0.05,
    min_learning_rate=0.01,
    warmup_steps=1,
    precision="float32",
    checkpoint_every=5,
    held_out_tokens=512,
)
OPTIONS = TuneOptions(loss="overlap", weight=1.0, anchor=0.01, run=RUN)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        words = " ".join(f"word{(number * 7 + place * place) % 23} says {place}" for place in range(120))
        (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    return folder


@pytest.fixture(params=["ours", "qwen3_moe"])
def model(request, tiny_config, tmp_path):
    folder = tmp_path / "model"
    if request.param == "ours":
        config = tiny_config(vocab_size=256, num_experts=8, router="qwen3_moe", num_hidden_layers=2)
        MoEForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    else:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        config = Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=32,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=2,
            initializer_range=0.2,
            **sizes,
        )
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_only_gates_change_and_tokens_reuse_experts_more(model, text, tmp_path):
    out = tmp_path / "tuned"
    report = tune_router(model, text_for(model, str(text)), out, OPTIONS, quiet=True)
    assert report["after"]["adjacent_reuse"] > report["before"]["adjacent_reuse"] + 0.05
    assert report["after"]["lru_25"] > report["before"]["lru_25"]
    assert json.loads((out / "tune_router.json").read_text()) == report

    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2
    assert all("gate" in name or "router" in name for name in changed)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("model", ["ours", pytest.param("qwen3_moe", marks=pytest.mark.slow)], indirect=True)
def test_a_run_that_is_resumed_is_the_same_run(model, text, tmp_path, monkeypatch):
    corpus = text_for(model, str(text))
    whole = tune_router(model, corpus, tmp_path / "whole", OPTIONS, quiet=True)
    step = _Tuning.step

    def fails(self, number):
        if number == 8:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(_Tuning, "step", fails)
    with pytest.raises(KeyboardInterrupt):
        tune_router(model, corpus, tmp_path / "parts", OPTIONS, quiet=True)
    assert not (tmp_path / "parts" / "config.json").exists(), "no model before the end"
    monkeypatch.setattr(_Tuning, "step", step)
    other = replace(OPTIONS, loss="l2")
    with pytest.raises(ValueError, match="begun with other settings"):
        tune_router(model, corpus, tmp_path / "parts", other, resume=True, quiet=True)
    assert tune_router(model, corpus, tmp_path / "parts", OPTIONS, resume=True, quiet=True) == whole
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_locality_by_hand():
    # one layer of four experts, top-2; the second sequence starts anew
    expert_TLK = torch.tensor([[[0, 1]], [[1, 2]], [[1, 2]], [[3, 0]]]).numpy().astype("int16")
    sequence_T = torch.tensor([0, 0, 0, 1]).numpy().astype("int32")
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=sequence_T, metadata={"num_experts": 4})
    found = locality_of(trace, shares=(0.5, 1.0), policies=("learned",))
    assert found["adjacent_reuse"] == 3 / 4
    assert found["lru_50"] == 3 / 8
    assert found["lru_100"] == found["learned_100"] == found["belady_100"] == 4 / 8
    assert found["srp"] is None


@pytest.mark.parametrize("router", ["hash", "pregate"])
def test_models_without_gates_of_their_own_layer_are_refused(router, tiny_config, text, tmp_path):
    MoEForCausalLM(tiny_config(vocab_size=256, router=router)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="must score experts for their own layer"):
        tune_router(tmp_path / "model", text_for(tmp_path / "model", str(text)), tmp_path / "out", OPTIONS, quiet=True)


def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys):
    assert run("tune-router", tmp_path / "none", "--out", tmp_path / "out") == 2
    assert "is no checkpoint folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'overlap'"):
        replace(OPTIONS, loss="overlaps")
    with pytest.raises(ValueError, match="weight must be a finite number"):
        replace(OPTIONS, weight=-1.0)
