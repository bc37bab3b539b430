"""Mixture of Thoughts: identities, causality, interaction by loops with every gradient, frozen members."""

import copy

import pytest
import torch

from moe import MixtureOfThoughts, MoEForCausalLM
from moe.inference.mixture_of_thoughts import Interaction


@pytest.fixture
def members(tiny_config):
    sizes = [{}, {"hidden_size": 16, "num_hidden_layers": 2}, {"num_hidden_layers": 4}]
    return [MoEForCausalLM(tiny_config(**size)).double().eval() for size in sizes]


def woken(mixture):
    """As after some training: nothing is 0."""
    with torch.no_grad():
        for parameter in (p for p in mixture.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    return mixture


def test_one_member_and_untrained_interactions_are_the_model(members):
    token_BS = torch.randint(96, (2, 7))
    with torch.no_grad():
        expected = members[0](token_BS).logits
        alone = MixtureOfThoughts(members[:1], width=8, levels=3).double()
        torch.testing.assert_close(alone(token_BS)[0], expected)
        many = MixtureOfThoughts(members, width=8).double()
        torch.testing.assert_close(many(token_BS)[0], expected)  # equal weights: the first member is primary


def test_the_primary_member_is_the_likeliest_and_others_run_only_if_used(members):
    mixture, token_BS, ran = MixtureOfThoughts(members, width=8, members_used=2).double(), torch.randint(96, (4, 5)), []
    woken(mixture)
    for number, member in enumerate(members):
        member.model.layers[0].register_forward_hook(lambda *given, number=number: ran.append(number))
    weight_BM = mixture.weights(token_BS)
    torch.testing.assert_close(weight_BM.sum(-1), torch.ones(4).double())
    assert ((weight_BM > 0).sum(-1) == 2).all()
    with torch.no_grad():
        for b in range(4):
            ran.clear()
            mixture(token_BS[b : b + 1])
            assert set(ran) == set(weight_BM[b].nonzero().flatten().tolist())


def test_batches_equal_singles_and_later_tokens_change_nothing(members):
    mixture, token_BS = woken(MixtureOfThoughts(members, width=8, members_used=2).double()), torch.randint(96, (4, 6))
    with torch.no_grad():
        whole = mixture(token_BS)[0]
        for b in range(4):
            torch.testing.assert_close(mixture(token_BS[b : b + 1])[0][0], whole[b])
        changed = token_BS.clone()
        changed[:, 4] = (changed[:, 4] + 1) % 96
        torch.testing.assert_close(mixture(changed)[0][:, :4], whole[:, :4])


def test_interaction_equals_loops_with_every_gradient(tolerance):
    layer = Interaction([6, 4], width=8, num_heads=2).double()
    with torch.no_grad():
        layer.back[0].weight.normal_()
    x, z = torch.randn(1, 3, 6).double().requires_grad_(), torch.randn(1, 3, 4).double().requires_grad_()
    weight_BM = torch.tensor([[0.7, 0.3]]).double().requires_grad_()
    ours = layer({0: x, 1: z}, weight_BM, 0)[0]
    common, rows = [layer.project[0](x)[0], layer.project[1](z)[0]], []
    for s in range(3):
        read = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            query = layer.query.weight[part] @ common[0][s]
            pairs = [(m, t) for m in range(2) for t in range(s + 1)]
            score = torch.stack([query @ (layer.key.weight[part] @ common[m][t]) / 2 for m, t in pairs]).softmax(0)
            value = torch.stack([weight_BM[0, m] * (layer.value.weight[part] @ common[m][t]) for m, t in pairs])
            read.append(score @ value)
        rows.append(x[0, s] + layer.back[0].weight @ torch.cat(read))
    expected = torch.stack(rows)
    torch.testing.assert_close(ours, expected, **tolerance[torch.float64])
    inputs = [x, z, weight_BM, *(p for name, p in layer.named_parameters() if "back.1" not in name)]
    seed = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), inputs) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, **tolerance[torch.float64])


def test_training_moves_router_and_interactions_and_leaves_members_alone(members):
    before = copy.deepcopy(members[1].state_dict())
    mixture, token_BS = MixtureOfThoughts(members, width=8).double(), torch.randint(96, (8, 8))
    trained = [p for p in mixture.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(12):
        _, loss = mixture(token_BS, labels=token_BS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert mixture.router.weight.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in members[1].state_dict().items())


def test_members_that_do_not_fit_are_refused(members, tiny_config):
    with pytest.raises(ValueError, match=r"levels must lie in 1\.\.2"):
        MixtureOfThoughts(members, levels=3)
    with pytest.raises(ValueError, match="one vocabulary"):
        MixtureOfThoughts([*members, MoEForCausalLM(tiny_config(vocab_size=50))])
    with pytest.raises(ValueError, match="'parallel_streams' has others"):
        MixtureOfThoughts([MoEForCausalLM(tiny_config(architecture="parallel_streams"))])
