"""Gradients through offloaded experts: those of the resident model, at every number of slots; rewiring by them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from moe import MoEForCausalLM, Rewiring, generate_rewired
from moe.inference.logit_offsets import logit_offsets
from offload.finetune.passing.through import gradients_pass
from tests.served_model import save_model

OLMOE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["ours", "olmoe"])
def saved(request, tmp_path_factory):
    from moe import MoEConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "ours":
        sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
        heads = {"num_key_value_heads": 2, "head_dim": 8}
        model = MoEForCausalLM(MoEConfig(vocab_size=96, num_experts=6, num_experts_per_tok=2, **heads, **sizes))
    else:
        model = AutoModelForCausalLM.from_config(
            OlmoeConfig(**OLMOE, intermediate_size=24, num_experts=8, num_experts_per_tok=2)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name or "gate" in name:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def gradient(model):
    with logit_offsets(model) as offsets, torch.enable_grad():
        delta_LR = offsets.delta_LR.requires_grad_()
        loss = model(PROMPT, labels=PROMPT, use_cache=False).loss
        return loss.detach(), torch.autograd.grad(loss, [delta_LR])[0]


@pytest.mark.parametrize("cache_experts", [1, 3, 8])
def test_gradients_are_the_resident_models(saved, cache_experts):
    folder, resident = saved
    loss, expected_LR = gradient(resident)
    model = offload.load(folder, cache_experts=cache_experts, arithmetic="exact")
    with torch.no_grad():
        before = model(PROMPT, use_cache=False).logits
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with gradients_pass(model):
        found_loss, found_LR = gradient(model)
        with torch.no_grad():
            assert torch.equal(model(PROMPT, use_cache=False).logits, before)
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found_LR, expected_LR, rtol=1e-3, atol=1e-6)
    assert expected_LR.abs().max() > 1e-4
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    with pytest.raises(RuntimeError, match="gradients do not pass through offloaded experts"):
        gradient(model)
    model.offload.close()


def test_rewired_text_is_the_resident_models(saved):
    folder, resident = saved
    settings, options = Rewiring(steps=2, every=4), {"max_new_tokens": 9, "do_sample": False}
    expected, report = generate_rewired(resident, PROMPT, settings, **options)
    model = offload.load(folder, cache_experts=2, arithmetic="exact")
    with gradients_pass(model):
        found, same = generate_rewired(model, PROMPT, settings, **options)
    assert torch.equal(found, expected)
    assert same["loss_after"] == pytest.approx(report["loss_after"], rel=1e-4)
    with pytest.raises(ValueError, match="rewire it by `generate --rewire`"):
        generate_rewired(model, PROMPT, settings, **options)
    model.offload.close()


def test_streamed_layers_pass_none(saved):
    model = offload.load(saved[0], cache_experts=2, resident_layers=0)
    with pytest.raises(ValueError, match="through layers that are in memory"), gradients_pass(model):
        pass
    model.offload.close()


def test_the_command_calls_it_lossy(run, tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    command = ("generate", folder, "--prompt", "abcab", "--max-new-tokens", 8, "--cache-experts", 2)
    assert run(*command, "--rewire", 3, "--json", tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    out, err = capsys.readouterr()
    assert "LOSSY: routers were shifted to the text" in err
    assert report["rewired"]["exactness"] == "lossy"
    assert len(report["rewired"]["loss_before"]) == -(-len(report["token_ids"]) // 3)
    assert len(report["token_ids"]) <= 8
    assert out == report["text"] + "\n" * bool(report["text"])
    assert run(*command, "--rewire", 3, "--skip-ffn", 0.9) == 2
    assert "each make another model" in capsys.readouterr().err.replace("\n", " ")
