"""Balance losses and z-loss on numbers worked out by hand, with the conventions of routing/losses/balance.py."""

import math

import pytest
import torch

from moe import MoEConfig, MoEForCausalLM
from routing import BALANCE_LOSSES, RouterStats, Routing, auxiliary_loss, scheduled_weight, switch_balance_loss, z_loss


def stats_of(expert_TK, probability_TR, num_zero=0, **fields):
    expert_TK, probability_TR = torch.tensor(expert_TK), torch.tensor(probability_TR)
    routing = Routing(
        expert_TK=expert_TK,
        weight_TK=torch.zeros(expert_TK.shape),
        num_experts=probability_TR.shape[1] - num_zero,
        num_zero_compute=num_zero,
    )
    fields = {"chosen": routing, "kept": routing, "logit_TR": probability_TR.log()} | fields
    return RouterStats(probability_TR=probability_TR, **fields)


def uniform_stats(num_routable, K, num_zero=0, **fields):
    """Every expert is chosen equally often and every probability is 1/R."""
    expert_TK = [[(t + k) % num_routable for k in range(K)] for t in range(num_routable)]
    return stats_of(expert_TK, [[1 / num_routable] * num_routable] * num_routable, num_zero, **fields)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("name", ["switch", "null_averaged", "first_choice", "sequence"])
def test_uniform_routing_gives_one_whatever_k(name, K):
    stats = uniform_stats(4, K, num_zero=2, sequence_T=torch.zeros(4, dtype=torch.int64))
    assert BALANCE_LOSSES[name](stats).item() == pytest.approx(1.0)


def test_switch_by_hand():
    # loads 2, 1, 1 of 4 slots; mean probabilities .5, .3, .2: 3 * (.5*.5 + .25*.3 + .25*.2)
    stats = stats_of([[0, 1], [0, 2]], [[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
    assert switch_balance_loss(stats).item() == pytest.approx(3 * 0.375)


def test_null_averaged_by_hand():
    # E=1, Z=2, loads 1, 3, 0 of 4: the nulls count 1.5 each; 3 * (.25*.5 + .375*.3 + .375*.2)
    stats = stats_of([[0, 1], [1, 1]], [[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], num_zero=2)
    assert BALANCE_LOSSES["null_averaged"](stats).item() == pytest.approx(3 * (0.125 + 0.1125 + 0.075))


def test_trap_null_average_runs_over_nulls_not_slots():
    """Released code slices the slot axis, which is empty for K <= 8: nulls are balanced one by one there."""
    one_by_one = stats_of([[0, 1], [1, 1]], [[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], num_zero=2)
    assert BALANCE_LOSSES["null_averaged"](one_by_one) != switch_balance_loss(one_by_one)
    same_sum = stats_of([[0, 1], [2, 1]], [[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], num_zero=2)
    assert BALANCE_LOSSES["null_averaged"](one_by_one) == BALANCE_LOSSES["null_averaged"](same_sum)


def test_weighted_targets_by_hand():
    # MoE++: tau = .75, 2 FFN + 1 zero-compute: targets .75/2.5, .75/2.5, 1/2.5; loads and probabilities at target
    target_R = torch.tensor([0.3, 0.3, 0.4])
    stats = stats_of([[0]] * 3 + [[1]] * 3 + [[2]] * 4, [[0.3, 0.3, 0.4]] * 10, num_zero=1, target_share_R=target_R)
    assert switch_balance_loss(stats).item() == pytest.approx(1.0)
    # the ratio of the coefficients of FFN and zero-compute terms is 1 : tau, as published
    assert (1 / target_R[0] * 0.75).item() == pytest.approx((1 / target_R[2]).item())


def test_first_choice_by_hand():
    stats = stats_of([[0, 1], [0, 2]], [[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
    assert BALANCE_LOSSES["first_choice"](stats).item() == pytest.approx(3 * 0.5)


def test_sequence_by_hand():
    # sequence 0: loads 1, 0; sequence 1: loads 0, 1; each collapses though the batch is balanced
    stats = stats_of([[0], [1]], [[1.0, 0.0], [0.0, 1.0]], sequence_T=torch.tensor([0, 1]), logit_TR=None)
    assert switch_balance_loss(stats).item() == pytest.approx(1.0)
    assert BALANCE_LOSSES["sequence"](stats).item() == pytest.approx(2.0)


def test_entropy_is_least_when_the_batch_mean_is_uniform():
    stats = stats_of([[0], [1]], [[1.0, 1e-30], [1e-30, 1.0]])
    assert BALANCE_LOSSES["entropy"](stats).item() == pytest.approx(-math.log(2))


def test_z_loss_by_hand():
    logit_TR = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    stats = stats_of([[0], [1]], [[0.5, 0.5]] * 2, logit_TR=logit_TR)
    assert z_loss(stats).item() == pytest.approx((math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2)


def test_trap_pooled_loss_hides_a_collapsed_layer():
    """Layer 0 sends all to expert 0, layer 1 all to expert 1: pooled it looks balanced, per layer it does not."""
    layers = [stats_of([[e]] * 2, [[1.0 - e, 0.0 + e]] * 2, logit_TR=None) for e in (0, 1)]
    assert auxiliary_loss(layers, balance_weight=1.0, z_weight=0.0).item() == pytest.approx(2.0)


def test_auxiliary_loss_is_the_mean_over_layers_of_weighted_terms():
    plain = uniform_stats(4, 2)
    with_penalty = uniform_stats(4, 2, penalty_T=torch.tensor([1.0, 2.0, 3.0, 2.0]), balance_loss="none", logit_TR=None)
    z = z_loss(plain).item()
    expected = ((0.1 * 1 + 0.01 * z) + 2.0) / 2
    assert auxiliary_loss([plain, with_penalty], balance_weight=0.1, z_weight=0.01).item() == pytest.approx(expected)


def test_shares_are_not_differentiated_and_probabilities_are():
    probability_TR = torch.tensor([[0.6, 0.4], [0.5, 0.5]], requires_grad=True)
    routing = Routing(expert_TK=torch.tensor([[0], [0]]), weight_TK=torch.ones(2, 1), num_experts=2)
    stats = RouterStats(probability_TR=probability_TR, chosen=routing, kept=routing)
    switch_balance_loss(stats).backward()
    assert probability_TR.grad.tolist() == [[1.0, 0.0], [1.0, 0.0]], "R * share / T, and nothing through the shares"


def test_sequence_loss_without_sequences_is_refused():
    with pytest.raises(ValueError, match="sequence_T"):
        BALANCE_LOSSES["sequence"](uniform_stats(4, 1))


def test_scheduled_weight_is_that_of_the_last_pair_reached():
    schedule = [[100, 1e-4], [200, 0.0]]
    assert [scheduled_weight(0.02, schedule, step) for step in (0, 99, 100, 199, 200, 999)] == [
        0.02, 0.02, 1e-4, 1e-4, 0.0, 0.0,
    ]  # fmt: skip
    assert scheduled_weight(0.02, None, 5) == 0.02


def test_model_follows_the_schedule_and_keeps_it_in_its_config(tiny_config, tmp_path):
    config = tiny_config(balance_loss_weight=1.0, z_loss_weight=0.0, balance_loss_schedule=[[2, 0.0]])
    config.save_pretrained(tmp_path)
    model = MoEForCausalLM(MoEConfig.from_pretrained(tmp_path)).train()
    token_BS = torch.randint(0, 96, (2, 8))
    weighs = []
    for _ in range(3):
        output = model(token_BS, labels=token_BS)
        weighs.append(bool(output.loss > output.lm_loss))
        model.model.post_step(torch.stack([layer.count_R for layer in output.router_stats]), 16)
    assert weighs == [True, True, False]
    with pytest.raises(ValueError, match="rising order"):
        tiny_config(balance_loss_schedule=[[5, 0.1], [2, 0.0]])
