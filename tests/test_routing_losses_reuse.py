"""Reuse losses: values and gradients against loops over tokens, a case by hand, padding, sequences apart."""

import math

import pytest
import torch

from routing import REUSE_LOSSES, RouterStats, Routing, adjacent_reuse, anchor_loss, auxiliary_loss
from routing.losses.reuse import KEPT_SHARE

R, K = 5, 2


def stats_of(logit_TR, sequence_T):
    probability_TR = logit_TR.softmax(dim=-1)
    expert_TK = probability_TR.detach().topk(K).indices
    routing = Routing(expert_TK=expert_TK, weight_TK=probability_TR.gather(1, expert_TK), num_experts=R)
    return RouterStats(probability_TR=probability_TR, chosen=routing, kept=routing, sequence_T=sequence_T)


def naive(name, stats):
    """The loss pair by pair."""
    terms, average = [], None
    for t in range(len(stats.sequence_T)):
        if t == 0 or stats.sequence_T[t] != stats.sequence_T[t - 1]:
            average = torch.zeros(R)
            continue
        p, q = stats.probability_TR[t - 1], stats.probability_TR[t]
        before, now = set(stats.chosen.expert_TK[t - 1].tolist()), set(stats.chosen.expert_TK[t].tolist())
        average = KEPT_SHARE * average + torch.tensor([float(e in before) for e in range(R)])
        if name == "replaced_l1":
            terms.append(len(now - before) * (q - p).abs().sum())
        elif name == "l2":
            terms.append((q - p).pow(2).sum())
        elif name == "overlap":
            terms.append(-torch.log(sum(q[e] for e in before) / K))
        elif name == "recent_use":
            terms.append(-torch.log((average / average.max() * q).sum()))
        elif name == "none":
            terms.append(0 * q.sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", REUSE_LOSSES)
def test_values_and_gradients_are_those_of_a_loop(name):
    logit_TR = torch.randn(23, R, dtype=torch.float64, requires_grad=True)
    stats = stats_of(logit_TR, torch.tensor([0] * 9 + [1] + [2] * 13))
    found, expected = REUSE_LOSSES[name](stats), naive(name, stats)
    torch.testing.assert_close(found, expected, check_dtype=False)
    if name != "none":
        (ours,) = torch.autograd.grad(found, logit_TR, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, logit_TR)
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_one_pair_by_hand():
    probability = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
    routing = Routing(
        expert_TK=torch.tensor([[0, 1], [2, 1]]), weight_TK=torch.tensor([[0.5, 0.3], [0.6, 0.3]]), num_experts=3
    )
    stats = RouterStats(probability_TR=probability, chosen=routing, kept=routing, sequence_T=torch.zeros(2).long())
    expected = {"replaced_l1": 0.8, "l2": 0.32, "overlap": -math.log(0.2), "recent_use": -math.log(0.4), "none": 0.0}
    assert {name: float(REUSE_LOSSES[name](stats)) for name in REUSE_LOSSES} == pytest.approx(expected)
    assert float(adjacent_reuse(stats)) == 0.5
    weights = {"balance_weight": 0.0, "z_weight": 0.0, "reuse_loss": "l2", "reuse_weight": 0.5}
    assert float(auxiliary_loss([stats], **weights)) == pytest.approx(0.16)


def test_sequences_of_one_token_have_no_pair_and_no_loss():
    logit_TR = torch.randn(4, R, requires_grad=True)
    stats = stats_of(logit_TR, torch.arange(4))
    for loss in REUSE_LOSSES.values():
        assert loss(stats).item() == 0
    assert float(adjacent_reuse(stats)) == 0


def test_the_anchor_is_the_divergence_from_the_router_before():
    first, second = torch.randn(6, R, dtype=torch.float64), torch.randn(6, R, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=first), torch.distributions.Categorical(logits=second)
    ).mean()
    torch.testing.assert_close(anchor_loss(second.softmax(-1), first.softmax(-1)), expected)
    assert float(anchor_loss(first.softmax(-1), first.softmax(-1))) == pytest.approx(0.0, abs=1e-12)
    assert math.isfinite(float(anchor_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))))


def test_statistics_without_sequences_are_refused():
    with pytest.raises(ValueError, match="sequence_T"):
        REUSE_LOSSES["l2"](stats_of(torch.randn(3, R), None))
