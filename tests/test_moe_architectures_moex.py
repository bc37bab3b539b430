import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from experiments.evidence.resident import load_resident
from moe import MoEForCausalLM
from routing import auxiliary_loss

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def build(tiny_config, **overrides):
    return MoEForCausalLM(tiny_config(architecture="moex", **overrides))


def layer_loop(x_TD, layer, top_k):
    """One token, one expert, one hidden unit at a time."""
    rows = []
    E, F, D = layer.experts.up_proj.shape
    for x_D in x_TD:
        scores = []
        for expert in range(E):
            mean, variance = 0.0, 0.0
            for i in range(D):
                column = layer.experts.up_proj[expert][:, i]
                mu = column.sum() / F
                mean = mean + mu * x_D[i]
                variance = variance + ((column - mu) ** 2).sum() / F * x_D[i] ** 2
            scores.append(-torch.erf(mean / (math.sqrt(2) * variance.sqrt())))
        best = sorted(range(E), key=lambda e: -float(scores[e].detach()))[:top_k]
        weights = torch.stack([scores[e] for e in best]).softmax(dim=0)
        y_D = 0.0
        for weight, expert in zip(weights, best, strict=True):
            hidden = torch.stack([(row @ x_D).clamp_min(0) for row in layer.experts.up_proj[expert]])
            y_D = y_D + weight * (layer.experts.down_proj[expert] @ hidden)
        rows.append(y_D)
    return torch.stack(rows)


def test_layer_equals_a_plain_loop_with_every_gradient(tiny_config, tolerance):
    model = build(tiny_config, num_hidden_layers=1, hidden_size=8, head_dim=4, num_attention_heads=2).double()
    model.train()
    layer, inputs, outputs = model.model.moe_layers[0], [], []
    layer.register_forward_hook(lambda _m, i, o: inputs.append(i) or outputs.append(o[0]))
    model(torch.randint(96, (1, 5)))
    theirs = layer_loop(inputs[0][0], layer, 2)
    torch.testing.assert_close(outputs[0], theirs, **tolerance[torch.float64])
    leaves, upstream = [inputs[0][0], *layer.parameters()], torch.randn_like(theirs)
    ours = torch.autograd.grad(outputs[0], leaves, upstream, retain_graph=True)
    for got, want in zip(ours, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(got, want, **tolerance[torch.float64])


def test_trap_deviation_is_the_root_of_the_variance(tiny_config):
    """With the root, the prediction is the true share of active units on random weights; without, it is far off."""
    layer = build(tiny_config, moe_intermediate_size=2000, num_experts=4).model.moe_layers[0]
    with torch.no_grad():
        layer.experts.up_proj.add_(0.1 * torch.randn(4, 1, 32)).mul_(4)
        layer.router.refresh()
        x_TD = torch.randn(50, 32)
        predicted_TE = (1 - layer.router.score(x_TD, layer.router.mean_ED, layer.router.variance_ED)) / 2
        true_TE = ((x_TD @ layer.experts.up_proj.mT) > 0).float().mean(dim=-1).T
        assert torch.corrcoef(torch.stack([predicted_TE.flatten(), true_TE.flatten()]))[0, 1] > 0.99
        assert (predicted_TE - true_TE).abs().mean() < 0.02
        mean_TE = x_TD @ layer.router.mean_ED.T
        without_root_TE = (1 + torch.erf(mean_TE / (2**0.5 * (x_TD.square() @ layer.router.variance_ED.T)))) / 2
        assert (without_root_TE - true_TE).abs().mean() > 0.02


def test_router_has_no_parameters_and_prefers_what_is_sparse(tiny_config):
    layer = build(tiny_config).model.moe_layers[0]
    assert not list(layer.router.parameters())
    with torch.no_grad():
        layer.experts.up_proj[3] = -layer.experts.up_proj[3].abs() - 0.1
        layer.router.refresh()
        x_TD = torch.rand(7, 32)
        score_TE = layer.router.score(x_TD, layer.router.mean_ED, layer.router.variance_ED)
    assert (score_TE.argmax(dim=-1) == 3).all(), "positive inputs, negative weights: no unit fires"


def test_statistics_follow_the_weights(tiny_config, tmp_path):
    model, token_BS = build(tiny_config), torch.randint(96, (2, 7))
    model.save_pretrained(tmp_path / "new")
    fresh = load_resident(tmp_path / "new")
    assert torch.equal(fresh(token_BS).logits, model.eval()(token_BS).logits), "never run before it was saved"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(token_BS, labels=token_BS).loss.backward()
    optimizer.step()
    model.eval()(token_BS)
    for layer in model.model.moe_layers:
        torch.testing.assert_close(layer.router.mean_ED, layer.experts.up_proj.detach().mean(dim=1))
    model.train()
    model(token_BS)
    optimizer.step()
    model.model.post_step([torch.zeros(6)] * 3, 14)
    assert all(layer.router.is_current for layer in model.model.moe_layers)


def test_training_and_evaluation_route_alike(tiny_config):
    model, token_BS = build(tiny_config).double(), torch.randint(96, (2, 7))
    trained, evaluated = model.train()(token_BS), model.eval()(token_BS)
    torch.testing.assert_close(trained.logits, evaluated.logits)


def test_balance_loss_reaches_the_experts_weights(tiny_config):
    model, token_BS = build(tiny_config, balance_loss_weight=1.0).train(), torch.randint(96, (2, 7))
    auxiliary_loss(model(token_BS).router_stats, balance_weight=1.0, z_weight=0.0).backward()
    assert all(layer.experts.up_proj.grad.abs().sum() > 0 for layer in model.model.moe_layers)
    assert model.model.moe_layers[-1].experts.down_proj.grad is None


def test_the_routers_statistics_stay_exact_in_a_halved_model(tiny_config, tmp_path):
    build(tiny_config, num_shared_experts=1).save_pretrained(tmp_path)
    token_BS = torch.randint(96, (2, 5))
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halved.model.moe_layers[0].router.mean_ED.dtype == torch.float32
    assert halved(token_BS).logits.isfinite().all()


@pytest.mark.parametrize("slots", [1, 2, 4, 6])
def test_offloaded_logits_are_the_resident_bits(tiny_config, tmp_path, slots):
    build(tiny_config).save_pretrained(tmp_path)
    resident = load_resident(tmp_path, experts_implementation="grouped_mm")
    loaded = offload.load(tmp_path, cache_experts=slots)
    token_BS = torch.randint(96, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(token_BS).logits, resident(token_BS).logits)
    assert torch.equal(
        loaded.generate(token_BS, **SETTINGS).sequences, resident.generate(token_BS, **SETTINGS).sequences
    )


def test_zero_compute_experts_are_refused(tiny_config):
    with pytest.raises(ValueError, match="zero-compute experts have none"):
        build(tiny_config, zero_compute_experts=["copy"])
