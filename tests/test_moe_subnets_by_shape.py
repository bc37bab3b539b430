"""Any-shape subnets: loss by loops with every gradient, the full shape, extracted models, drawn shapes."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moe import ElasticModel, MoEForCausalLM, ShapePlan, carve, unit_importance

TOKENS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
DROPPED = [frozenset(), frozenset({1})]


def elastic_of(tiny_config, fill=True, **plan):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(num_experts=1, num_experts_per_tok=1)).double().eval()
    settings = ShapePlan(**{"adapters": 3, "rank": 2, **plan})
    elastic = ElasticModel(model, unit_importance(model, TOKENS), DROPPED, [24, 10], settings, seed=1).eval()
    if fill:
        with torch.no_grad():
            for number, weight in enumerate(elastic.adapters_b.values()):
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return model, elastic


def looped_gate(elastic, layer, depth, width):
    """The two best of three scores, weighed by their exponentials."""
    gate, code = elastic.gates[layer], torch.zeros(4).double()
    code[[3, 2].index(depth)] = code[2 + [24, 10].index(width)] = 1.0
    score = gate.outer @ (gate.inner @ code)
    order = score.argsort(descending=True)[:2].tolist()
    return {e: score[e].exp() / sum(score[other].exp() for other in order) for e in order}


def looped_logits(model, elastic, depth, width):
    """The whole model with adapted weights in which what is left out writes nothing."""
    subnet, weights = elastic.subnets[depth, width], {}
    for name, weight in model.named_parameters():
        if not name.startswith("model.layers.") or weight.ndim < 2 or "router" in name:
            continue
        layer, key = int(name.split(".")[2]), name.replace(".", "/")
        tuned = weight.reshape(weight.shape[-2:])
        for e, share in looped_gate(elastic, layer, depth, width).items():
            tuned = tuned + share * 16.0 / 2 * elastic.adapters_b[key][e] @ elastic.adapters_a[key][e]
        is_there = layer in subnet.layers
        if name.endswith("o_proj.weight") and not is_there:
            tuned = tuned * 0.0
        if name.endswith("down_proj"):
            keep = torch.zeros(24).double()
            if is_there:
                keep[subnet.units[subnet.layers.index(layer)]] = 1.0
            tuned = tuned * keep
        weights[name] = tuned.view_as(weight)
    return functional_call(model, weights, (TOKENS,)).logits[:, :-1].flatten(0, 1).float()


@pytest.mark.parametrize("balances", [True, False])
def test_the_loss_equals_loops_over_adapters_with_every_gradient(tiny_config, balances):
    model, elastic = elastic_of(tiny_config, balances=balances, sampled=9)
    largest = looped_logits(model, elastic, 3, 24)
    own = cross_entropy(largest, TOKENS[:, 1:].flatten())
    teacher, expected = largest.detach().softmax(-1), own
    for depth, width in [(2, 10), (3, 10), (2, 24)]:
        log_p = looped_logits(model, elastic, depth, width).log_softmax(-1)
        distilled = (teacher * (teacher.log() - log_p)).sum(-1).mean()
        expected = expected + (distilled * (own / distilled).detach() if balances else distilled)
    found, parameters = elastic.loss(TOKENS), dict(elastic.named_parameters())
    # predictions are compared in float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    used = [parameter for name, parameter in parameters.items() if not name.endswith("noise")]
    for a, b in zip(*(torch.autograd.grad(loss, used) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_full_shape_is_the_model_and_untuned_subnets_are_cut_out_of_it(tiny_config):
    model, elastic = elastic_of(tiny_config, fill=False)
    assert torch.equal(elastic(TOKENS, elastic.largest), model(TOKENS).logits)
    assert torch.equal(elastic.extract(elastic.largest)(TOKENS).logits, model(TOKENS).logits)
    cut = carve(model, elastic.subnets[2, 10])
    assert torch.equal(elastic(TOKENS, (2, 10)), cut(TOKENS).logits)
    assert elastic.smallest == (2, 10)


def test_extracted_subnets_are_plain_checkpoints_that_compute_what_was_trained(tiny_config, tmp_path, tolerance):
    _, elastic = elastic_of(tiny_config)
    with torch.no_grad():
        expected = elastic(TOKENS, (2, 10))
    elastic.train().extract((2, 10)).save_pretrained(tmp_path)
    assert elastic.training
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert (again.config.num_hidden_layers, again.config.moe_intermediate_size) == (2, 10)
    torch.testing.assert_close(again(TOKENS).logits, expected, **tolerance[torch.float64])
    step = again(TOKENS[:, -1:], past_key_values=again(TOKENS[:, :-1], use_cache=True).past_key_values)
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], **tolerance[torch.float64])


def test_one_adapter_is_lora_for_all_shapes_and_gates_are_noisy_in_training(tiny_config):
    _, lora = elastic_of(tiny_config, adapters=1, adapters_used=1)
    assert len(lora.gates) == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(lora.weights((3, 24))[name], lora.weights((2, 10))[name])
    model, elastic = elastic_of(tiny_config)
    assert not torch.equal(elastic.weights((3, 24))[name], elastic.weights((2, 10))[name])
    elastic.train()
    assert not torch.equal(elastic.weights((3, 24))[name], elastic.weights((3, 24))[name])
    elastic.loss(TOKENS).backward()
    assert all(gate.noise.grad.abs().sum() > 0 for gate in elastic.gates)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_step_takes_the_smallest_shape_and_some_others_once(tiny_config):
    _, elastic = elastic_of(tiny_config, sampled=1)
    drawn = [elastic.step_shapes() for _ in range(20)]
    assert all(shapes[0] == (2, 10) and len(shapes) == 2 for shapes in drawn)
    assert {shapes[1] for shapes in drawn} == {(3, 10), (2, 24)}


def test_what_does_not_fit_is_refused(tiny_config):
    model, elastic = elastic_of(tiny_config)
    with pytest.raises(ValueError, match=r"shapes are of depth \[3, 2\] and width \[24, 10\]"):
        elastic.weights((1, 24))
    with pytest.raises(ValueError, match="widths must fall and begin with 24"):
        ElasticModel(model, torch.rand(3, 24), DROPPED, [10, 24], ShapePlan())
    with pytest.raises(ValueError, match=r"adapters_used must lie in 1\.\.5"):
        ShapePlan(adapters_used=6)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        ShapePlan(rank=0)
