"""Prompt-routed pruning: the loss by loops over rows with every gradient, codes as subnets, transport, routing."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from moe import MoEForCausalLM, PromptPlan, PromptPruner, carve, kept_share
from moe.subnets.by_prompt import CODE_GAIN, transported

TOKENS = torch.randint(96, (5, 9), generator=torch.Generator().manual_seed(0))
PROMPT = 4


def pruner_of(tiny_config, **plan):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(num_experts=1, num_experts_per_tok=1)).double().eval()
    pruner = PromptPruner(model, PromptPlan(**{"codes": 3, **plan}), seed=1).eval()
    with torch.no_grad():  # codes that leave parts out, each its own
        pruner.codes.normal_(mean=-0.2, std=0.2, generator=torch.Generator().manual_seed(2))
        pruner.codes[:, :3] = torch.tensor([[0.0, -0.3, -0.1], [-0.4, -0.1, 0.1], [-0.1, 0.0, -0.3]])
    return model, pruner


def bit(number):
    """Hard, with the soft one's gradient."""
    soft = 1 / (1 + torch.exp(-(number + 2.0 - math.log(math.log(2))) / 0.4))
    return soft + (soft.round() - soft).detach(), soft


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def vector(depth, width):
    parts = [depth]
    for d, units in zip(depth, width.view(3, 24), strict=True):
        parts.append(d * units / math.sqrt(24))
    return torch.cat(parts)


def looped_loss(model, pruner, codes_of):
    """Row by row; `codes_of` assigns."""
    hard = [[bit(number)[0] for number in (code * CODE_GAIN).split([3, 72])] for code in pruner.codes]
    vectors = [vector(*code) for code in hard]
    embedding, own = [], []
    for row in TOKENS:
        e = pruner.embed(row[None, :PROMPT])[0]
        x = e / e.square().sum().sqrt() * math.sqrt(32)
        predicted = pruner.outer @ torch.relu(pruner.inner @ x)
        own.append(vector(bit(predicted[:3])[1], bit(predicted[3:])[1]))
        embedding.append(e)
    likeness = torch.stack([torch.stack([cosine(o, v.detach()) for v in vectors]) for o in own])
    given = codes_of(likeness.detach())
    chosen = given.argmax(-1).tolist()
    total, shares, contrast, agreement = 0.0, [], 0.0, 0.0
    attention, units = 32 * 8 * 12, 3 * 32 * 24
    for number, row in enumerate(TOKENS):
        depth, width = hard[chosen[number]]
        weights = {}
        for layer in range(3):
            mask = width[24 * layer : 24 * layer + 24] * depth[layer]
            prefix = f"model.layers.{layer}."
            weights[prefix + "self_attn.o_proj.weight"] = (
                depth[layer] * model.model.layers[layer].self_attn.o_proj.weight
            )
            weights[prefix + "mlp.experts.down_proj"] = model.model.layers[layer].mlp.experts.down_proj * mask
        logits = functional_call(model, weights, (row[None],)).logits[0, :-1].float()
        teacher = model(row[None]).logits[0, :-1].float().softmax(-1)
        divergence = (teacher * (teacher.log() - logits.log_softmax(-1))).sum(-1).mean()
        total = total + (cross_entropy(logits, row[1:]) + divergence) / len(TOKENS)
        kept = sum(depth[i] * (attention + units * width[24 * i : 24 * i + 24].mean()) for i in range(3))
        shares.append(kept / (3 * (attention + units)))
        likes = torch.stack([cosine(own[number], other) for other in own]) / 0.1
        wanted = torch.stack([cosine(embedding[number], other) for other in embedding]) / 0.1
        contrast = contrast - (wanted.softmax(-1) * likes.log_softmax(-1)).sum() / len(TOKENS)
        agreement = agreement - (given[number] * (likeness[number] / 0.1).log_softmax(-1)).sum() / len(TOKENS)
    return total + 4.0 * (torch.stack(shares).mean() / 0.6).log().abs() + contrast + agreement


@pytest.mark.parametrize("transports", [True, False])
def test_the_loss_equals_loops_over_rows_with_every_gradient(tiny_config, transports):
    model, pruner = pruner_of(tiny_config, transports=transports)

    def codes_of(likeness_BN):
        if not transports:
            return torch.nn.functional.one_hot(likeness_BN.argmax(-1), 3).double()
        share = (likeness_BN / 0.05).exp()
        for _ in range(3):
            share = share / share.sum(0)
            share = share / share.sum(1, keepdim=True)
        return share

    losses = [pruner.loss(TOKENS, PROMPT), looped_loss(model, pruner, codes_of)]
    # predictions are compared in float32
    torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-5, atol=1e-5)
    parameters = list(pruner.parameters())
    assert len(parameters) == 3
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert a.abs().max() > 0


def test_codes_are_subnets_whose_models_compute_what_masks_do(tiny_config, tolerance):
    model, pruner = pruner_of(tiny_config)
    depth_NL, width_NLF = pruner.masks()
    shares = pruner.share(depth_NL, width_NLF)
    for code in range(3):
        subnet = pruner.subnet(code)
        assert 1 < sum(subnet.widths) < 3 * 24
        assert shares[code].item() == pytest.approx(kept_share(model, subnet))
        expected = functional_call(model, pruner.masked_weights(depth_NL[code], width_NLF[code]), (TOKENS,)).logits
        torch.testing.assert_close(carve(model, subnet)(TOKENS).logits, expected, **tolerance[torch.float64])


def test_an_untrained_code_is_the_model_and_an_empty_one_keeps_the_strongest(tiny_config):
    model, pruner = pruner_of(tiny_config)
    with torch.no_grad():
        pruner.codes.zero_()
        pruner.codes[1] = -1.0
        pruner.codes[1, 2] = pruner.codes[1, 3 + 2 * 24 + 5] = -0.9
    assert torch.equal(carve(model, pruner.subnet(0))(TOKENS).logits, model(TOKENS).logits)
    least = pruner.subnet(1)
    assert least.layers == (2,)
    assert least.units[0].tolist() == [5]


def test_transport_uses_codes_alike_and_routing_needs_no_batch(tiny_config):
    plan = PromptPlan(transport_rounds=200)
    likeness_BN = torch.rand(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    likeness_BN[:, 0] += 1.0  # all would take the first
    share_BN = transported(likeness_BN, plan)
    torch.testing.assert_close(share_BN.sum(1), torch.ones(12).double())
    torch.testing.assert_close(share_BN.sum(0), torch.full((4,), 3.0).double(), rtol=1e-3, atol=1e-3)
    _, pruner = pruner_of(tiny_config)
    together = pruner.train().route(TOKENS[:, :PROMPT])
    assert pruner.training
    assert together.tolist() == [int(pruner.route(row[None, :PROMPT])) for row in TOKENS]


def test_training_draws_noise_and_leaves_the_model_alone(tiny_config):
    model, pruner = pruner_of(tiny_config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner.train()
    assert not torch.equal(pruner.masks()[1], pruner.masks()[1])
    optimizer = torch.optim.SGD(pruner.parameters(), lr=0.1)
    pruner.loss(TOKENS, PROMPT).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"codes": 0}, "codes and transport_rounds"), ({"budget": 1.5}, "budget must"), ({"temperature": 0.0}, "above 0")],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PromptPlan(**change)
