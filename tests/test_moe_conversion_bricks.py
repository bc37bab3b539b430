"""Bricks: units of dense feed-forward networks retrieved, merged, updated and grown; identities, and the command."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe import save_byte_tokenizer
from moe.conversion.bricks.units import grow, merge, retrieve, strength, update


def dense(seed=0, **sizes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | sizes)).double().eval()


TOKENS = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def with_units_in_another_order(model):
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        order = torch.randperm(24)
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            projection = getattr(layer.mlp, name)
            projection.weight.data = projection.weight.data.index_select(axis, order)
    return other


def test_strength_is_the_mean_of_the_hidden_units_by_hand():
    model = dense()
    found, seen = strength(model, TOKENS), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    model(TOKENS)
    for (mlp, x), strength_F in zip(seen, found, strict=True):
        hidden = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        torch.testing.assert_close(strength_F.double(), hidden.abs().mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)


def test_retrieving_all_units_keeps_the_model_and_fewer_are_the_masked_one():
    model, expected = dense(), logits(dense())
    strength_LF = strength(model, TOKENS)
    assert torch.equal(logits(retrieve(dense(), strength_LF, 24)), expected)
    masked = dense()
    for layer, strength_F in zip(masked.model.layers, strength_LF, strict=True):
        weak = strength_F.argsort()[:14]
        layer.mlp.down_proj.weight.data[:, weak] = 0
    small = retrieve(dense(), strength_LF, 10)
    assert small.config.intermediate_size == 10
    torch.testing.assert_close(logits(small), logits(masked))
    with pytest.raises(ValueError, match=r"must lie in 1\.\.24, the units of a layer; got 25"):
        retrieve(dense(), strength_LF, 25)


def test_merging_with_the_same_units_in_another_order_is_the_model():
    model = dense()
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model, with_units_in_another_order(model))), expected)
    plain = {name: p.lerp(q, 0.5) for (name, p), (_, q) in zip(*_shuffled_pair(), strict=True)}
    unpaired = dense()
    unpaired.load_state_dict(plain)
    assert not torch.allclose(logits(unpaired), expected), "without pairing strangers are averaged"


def _shuffled_pair():
    model = dense()
    return model.state_dict().items(), with_units_in_another_order(model).state_dict().items()


def test_a_share_of_none_or_all_is_one_of_the_two():
    other = dense(seed=5)
    assert torch.equal(logits(merge(dense(), other, 0.0)), logits(dense()))
    torch.testing.assert_close(logits(merge(dense(), other, 1.0)), logits(other))
    with pytest.raises(ValueError, match="must have the same parameters"):
        merge(dense(), dense(hidden_size=16))


def test_updating_all_units_takes_the_other_network_and_none_keeps_it():
    model, other = dense(), dense(seed=5)
    strength_LF = strength(model, TOKENS)
    expected = dense()
    for layer, theirs in zip(expected.model.layers, other.model.layers, strict=True):
        layer.mlp = theirs.mlp
    torch.testing.assert_close(logits(update(dense(), other, strength_LF, 24)), logits(expected))
    assert torch.equal(logits(update(dense(), other, strength_LF, 0)), logits(dense()))
    partly = update(dense(), other, strength_LF, 3)
    for layer, before, theirs, strength_F in zip(
        partly.model.layers, dense().model.layers, other.model.layers, strength_LF, strict=True
    ):
        for unit in range(24):
            source = theirs if unit in strength_F.topk(3).indices else before
            assert torch.equal(layer.mlp.gate_proj.weight[unit], source.mlp.gate_proj.weight[unit])
            assert torch.equal(layer.mlp.down_proj.weight[:, unit], source.mlp.down_proj.weight[:, unit])


def test_growing_keeps_the_function_and_new_units_learn():
    model = dense()
    expected = logits(model)
    grow(model, 5)
    torch.testing.assert_close(logits(model), expected)
    model(TOKENS, labels=TOKENS).loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.down_proj.weight.grad[:, 24:].abs().sum(0).min() > 0


def test_the_command_writes_checkpoints_that_load_and_names_what_is_missing(tmp_path, run, capsys):
    for name, seed in (("a", 0), ("b", 5)):
        dense(seed).float().save_pretrained(tmp_path / name)
        save_byte_tokenizer(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    calls = {
        "retrieve": ("--data", text, "--units", 8),
        "merge": ("--with", tmp_path / "b"),
        "update": ("--data", text, "--with", tmp_path / "b", "--units", 4),
        "grow": ("--units", 8),
    }
    for operation, arguments in calls.items():
        out, report = tmp_path / operation, tmp_path / f"{operation}.json"
        assert run("bricks", operation, tmp_path / "a", *arguments, "--out", out, "--json", report) == 0
        made = AutoModelForCausalLM.from_pretrained(out)
        units = {"retrieve": 8, "grow": 32}.get(operation, 24)
        assert made.config.intermediate_size == units == json.loads(report.read_text())["units"]
        assert made.model.layers[0].mlp.gate_proj.weight.shape == (units, 32)
    capsys.readouterr()
    assert run("bricks", "update", tmp_path / "a", "--units", 2, "--out", tmp_path / "new") == 2
    assert "update needs --data and --with" in capsys.readouterr().err
    assert run("bricks", "grow", tmp_path / "a", "--units", 2, "--data", text, "--out", tmp_path / "new") == 2
    assert "grow takes no --data" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
