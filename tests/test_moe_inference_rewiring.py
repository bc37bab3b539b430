import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import offload
from moe import MoEForCausalLM
from moe.conversion.export import export
from moe.inference.logit_offsets import logit_offsets
from moe.inference.rewiring import Rewiring, confidence_L, generate_rewired, layer_weights, rewired

FAMILIES = {
    "olmoe": {"qk_norm": "full", "router": "olmoe"},
    "qwen3_moe": {"qk_norm": "head", "router": "qwen3_moe"},
    "mixtral": {"qk_norm": "none", "router": "mixtral"},
}


def native_model(model, family, folder):
    export(model, family).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_do_the_same_in_transformers_own_classes(tiny_config, tmp_path, family):
    ours = MoEForCausalLM(tiny_config(**FAMILIES[family])).eval()
    native = native_model(ours, family, tmp_path)
    token_BS, delta_LR = torch.randint(96, (2, 7)), torch.randn(3, 6)
    results = []
    for model in (ours, native):
        plain = model(token_BS).logits
        with logit_offsets(model) as offsets:
            torch.testing.assert_close(model(token_BS).logits, plain)
            offsets.delta_LR.copy_(delta_LR)
            offsets.delta_LR.requires_grad_()
            shifted = model(token_BS).logits
            (gradient,) = torch.autograd.grad(shifted.square().sum(), [offsets.delta_LR])
            results.append((shifted.detach(), gradient, [offsets.logits[layer] for layer in range(3)]))
        assert torch.equal(model(token_BS).logits, plain), "offsets are gone"
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(results[0][0], plain, atol=1e-2)


def test_gradient_of_offsets_equals_differences(tiny_config):
    model = MoEForCausalLM(tiny_config(router="mixtral")).double().eval()
    token_BS = torch.randint(96, (1, 6))
    with logit_offsets(model) as offsets:
        delta_LR = offsets.delta_LR.requires_grad_()
        (gradient_LR,) = torch.autograd.grad(model(token_BS, labels=token_BS).loss.double(), [delta_LR])
        for place in [(0, 0), (1, 3), (2, 5)]:
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    delta_LR[place] += sign * 1e-3
                    losses.append(model(token_BS, labels=token_BS).loss.item())
                    delta_LR[place] -= sign * 1e-3
            assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float(gradient_LR[place]), abs=1e-4)


@pytest.mark.parametrize("family", ["ours", "olmoe"])
def test_fitting_lowers_the_contexts_loss_and_every_request_starts_anew(tiny_config, tmp_path, family):
    model = MoEForCausalLM(tiny_config(qk_norm="full")).eval()
    model = model if family == "ours" else native_model(model, "olmoe", tmp_path)
    first, second = torch.randint(96, (1, 12)), torch.randint(96, (1, 9))
    settings = Rewiring(steps=4, every=3)
    alone, report = generate_rewired(model, second, settings, max_new_tokens=7, do_sample=False)
    assert alone.shape == (1, 16)
    assert len(report["loss_before"]) == 3
    assert report["fitted_tokens"] == 4 * (9 + 12 + 15)
    assert all(after < before for before, after in zip(report["loss_before"], report["loss_after"], strict=True))
    assert report["fit_s"] > 0 < report["generate_s"]
    generate_rewired(model, first, settings, max_new_tokens=4, do_sample=False)
    again, same = generate_rewired(model, second, settings, max_new_tokens=7, do_sample=False)
    assert torch.equal(again, alone)
    assert same["loss_before"] == report["loss_before"], "trap: offsets leak from one request into the next"


def test_without_steps_it_is_plain_generation(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    token_BS = torch.randint(96, (1, 5))
    made, report = generate_rewired(model, token_BS, Rewiring(steps=0, every=4), max_new_tokens=9, do_sample=False)
    assert torch.equal(made, model.generate(token_BS, max_new_tokens=9, do_sample=False))
    assert report["largest_offset"] == 0


def test_trap_prefix_is_computed_anew_with_the_offsets(tiny_config):
    """Keys and values of a stretch belong to its own offsets: each token is the argmax of a whole forward pass."""
    model = MoEForCausalLM(tiny_config()).eval()
    token_BS = torch.randint(96, (1, 6))
    made, _ = generate_rewired(model, token_BS, Rewiring(steps=3, every=50), max_new_tokens=5, do_sample=False)
    with logit_offsets(model) as offsets:
        optimizer = torch.optim.Adam([offsets.delta_LR], lr=0.05)
        for _ in range(3):
            delta = offsets.delta_LR.requires_grad_()
            (delta.grad,) = torch.autograd.grad(model(token_BS, labels=token_BS).loss, [delta])
            optimizer.step()
        offsets.delta_LR.requires_grad_(False)
        assert torch.equal(model(made[:, :-1]).logits[:, 5:].argmax(-1), made[:, 6:])


def test_trap_formula_and_text_disagree_on_what_is_confident():
    sharp, flat = torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0]])
    by_formula = confidence_L([sharp, flat], 1, "flat")
    assert by_formula[1] > by_formula[0], "as written, flatter routing counts as more confident"
    by_text = confidence_L([sharp, flat], 1, "sharp")
    assert by_text[0] > by_text[1]
    assert by_formula[0] == pytest.approx(-torch.tensor([9.0, 0, 0, 0]).log_softmax(0)[0].item())
    hard = Rewiring(selection="hard", share=0.5)
    assert layer_weights(by_formula, hard).tolist() == [0.0, 1.0]
    assert layer_weights(by_text, hard).tolist() == [1.0, 0.0]
    soft = layer_weights(by_text, Rewiring(selection="soft"))
    assert soft[0] == 1.0 > soft[1] > 0


@pytest.mark.parametrize("reading", ["flat", "sharp"])
def test_hard_selection_leaves_other_layers_alone(tiny_config, reading):
    model = MoEForCausalLM(tiny_config()).eval()
    kept, seen = [], []
    router = model.model.routers[0]
    router.register_forward_hook(lambda _r, inputs, _o: seen.append(inputs[2].logit_bias_LR))
    settings = Rewiring(selection="hard", share=0.34, reading=reading, steps=2)
    original = model.generate

    def generate(*args, **kwargs):
        kept.append(seen[-1].clone())
        return original(*args, **kwargs)

    model.generate = generate
    generate_rewired(model, torch.randint(96, (1, 8)), settings, max_new_tokens=2, do_sample=False)
    assert (kept[0].abs().sum(dim=1) > 0).sum() == 1


@pytest.mark.parametrize("family", ["ours", "mixtral"])
def test_trap_top_1_with_renormalised_weights_has_no_gradient(tiny_config, tmp_path, family):
    model = MoEForCausalLM(tiny_config(router="mixtral", num_experts_per_tok=1, qk_norm="none")).eval()
    model = model if family == "ours" else native_model(model, "mixtral", tmp_path)
    with pytest.raises(ValueError, match="no gradient with respect to router logits"):
        generate_rewired(model, torch.randint(96, (1, 6)), Rewiring(), max_new_tokens=2)
    assert not model._forward_hooks


def test_generation_stops_at_the_end_token(tiny_config):
    model = MoEForCausalLM(tiny_config()).eval()
    token_BS = torch.randint(96, (1, 6))
    made, _ = generate_rewired(model, token_BS, Rewiring(steps=1, every=2), max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = int(made[0, 7])
    stopped, _ = generate_rewired(model, token_BS, Rewiring(steps=1, every=2), max_new_tokens=8, do_sample=False)
    assert torch.equal(stopped, made[:, : stopped.shape[1]])
    assert stopped.shape[1] <= 8


def test_what_cannot_be_rewired_is_refused(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config()).eval()
    with pytest.raises(ValueError, match="one request"):
        generate_rewired(model, torch.randint(96, (2, 6)), Rewiring(), max_new_tokens=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass no gradients"):
        generate_rewired(offload.load(tmp_path), torch.randint(96, (1, 6)), Rewiring(), max_new_tokens=2)
    llama = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=96, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="has no experts"):
        generate_rewired(
            AutoModelForCausalLM.from_config(llama), torch.randint(96, (1, 6)), Rewiring(), max_new_tokens=2
        )
    for wrong in ({"selection": "some"}, {"reading": "x"}, {"share": 0.0}, {"steps": -1}):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            Rewiring(**wrong)


def test_within_it_the_model_is_fitted_to_a_context_and_afterwards_as_it_was(tiny_config):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(router="mixtral")).double().eval().requires_grad_(False)
    token_1S, gently = torch.randint(96, (1, 12)), Rewiring(steps=3, rate=1e-3)
    with torch.no_grad():
        plain = model(token_1S).logits
    with rewired(model, token_1S, Rewiring(steps=0)):
        assert torch.equal(model(token_1S).logits, plain)
    with rewired(model, token_1S, gently) as report, torch.no_grad():
        logits = model(token_1S).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), token_1S[0, 1:])
    assert report["loss_after"] == [pytest.approx(loss.item(), rel=1e-6)]
    assert report["loss_after"][0] < report["loss_before"][0]
    assert torch.equal(model(token_1S).logits, plain)
    with (
        pytest.raises(ValueError, match="one request of at least 2 tokens"),
        rewired(model, token_1S[:, :1], Rewiring()),
    ):
        pass
