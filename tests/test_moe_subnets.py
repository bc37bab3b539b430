"""Subnets: cut out they compute what the masked model does, the whole one is the model; layers by brute force."""

import itertools

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from moe import MoEForCausalLM, Subnet, carve, droppable_layers, kept_share, strongest, unit_importance
from moe.subnets.subnet import whole

TOKENS = torch.arange(22).view(2, 11)
CUT = Subnet((0, 2), (torch.tensor([1, 5, 7]), torch.tensor([0, 2, 3, 9, 20])))


@pytest.fixture
def dense(tiny_config):
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(num_experts=1, num_experts_per_tok=1)).double().eval()


def masked(model, subnet):
    """Weights of the whole model in which what is cut writes nothing."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(3):
        prefix = f"model.layers.{number}."
        keep = torch.zeros(24, dtype=torch.float64)
        if number in subnet.layers:
            keep[subnet.units[subnet.layers.index(number)]] = 1.0
        else:
            weights[prefix + "self_attn.o_proj.weight"].zero_()
        weights[prefix + "mlp.experts.down_proj"] *= keep
    return weights


def test_a_cut_model_computes_what_the_masked_one_does_and_is_a_checkpoint_once_even(dense, tmp_path, tolerance):
    expected = functional_call(dense, masked(dense, CUT), (TOKENS,)).logits
    cut = carve(dense, CUT)
    assert [layer.mlp.experts.down_proj.shape[2] for layer in cut.model.layers] == [3, 5]
    torch.testing.assert_close(cut(TOKENS).logits, expected, **tolerance[torch.float64])
    carve(dense, CUT, is_even=True).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.moe_intermediate_size == 5
    torch.testing.assert_close(again(TOKENS).logits, expected, **tolerance[torch.float64])
    step = again(TOKENS[:, -1:], past_key_values=again(TOKENS[:, :-1], use_cache=True).past_key_values)
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], **tolerance[torch.float64])


def test_the_whole_subnet_is_the_model_and_shares_count_matrices(dense):
    full = whole(dense)
    assert torch.equal(carve(dense, full)(TOKENS).logits, dense(TOKENS).logits)
    assert kept_share(dense, full) == 1.0
    attention, unit = 32 * 8 * (4 + 2 + 2 + 4), 3 * 32
    assert kept_share(dense, CUT) == pytest.approx((2 * attention + 8 * unit) / (3 * (attention + 24 * unit)))


def test_importance_is_variance_times_what_is_written(dense):
    seen = []
    handle = dense.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    dense(TOKENS)
    handle.remove()
    experts, x_TD = dense.model.layers[1].mlp.experts, seen[0].detach()
    gate, up = experts.gate_up_proj[0].detach().chunk(2)
    hidden = torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)
    written = experts.down_proj[0].detach().square().sum(dim=0)
    expected = [np.var(hidden[:, unit].numpy(), ddof=1) * float(written[unit]) for unit in range(24)]
    found = unit_importance(dense, TOKENS)
    torch.testing.assert_close(found[1], torch.tensor(expected, dtype=torch.float32))
    kept = strongest(found, [1], 4).units[0]
    assert kept.tolist() == sorted(np.argsort(expected)[::-1][:4].tolist())


def test_layers_left_out_are_the_best_of_all_where_costs_add_up_and_few_models_are_tried():
    draws = np.random.default_rng(0)
    for _ in range(20):
        cost, tried = draws.random(7), []

        def loss(choice, cost=cost, tried=tried):
            tried.append(choice)
            return sum(cost[layer] for layer in choice)

        found = droppable_layers(loss, 7, 4)
        for count, choice in enumerate(found):
            best = min(itertools.combinations(range(6), count), key=lambda rest, cost=cost: sum(cost[i] for i in rest))
            assert choice == frozenset(best)
        assert len(tried) == len(set(tried)) <= 2 * 6 * 4


def test_layers_are_judged_by_the_model_that_they_leave():
    """Layers 0 and 1 are both dispensable, but not together: then 1 and 2 go, since 1 alone is the better start."""
    losses = {frozenset(): 0.0, frozenset({0}): 0.2, frozenset({1}): 0.1, frozenset({2}): 0.5}
    losses |= {frozenset({0, 1}): 9.0, frozenset({0, 2}): 0.8, frozenset({1, 2}): 0.6}
    assert droppable_layers(losses.__getitem__, 4, 2) == [frozenset(), frozenset({1}), frozenset({1, 2})]


def test_what_does_not_fit_is_refused(dense, tiny_config):
    with pytest.raises(ValueError, match="cut out of dense decoders"):
        carve(MoEForCausalLM(tiny_config()), CUT)
    with pytest.raises(ValueError, match="kept layers must be at least one"):
        Subnet((), ())
    with pytest.raises(ValueError, match="kept units, at least one, of each of 2 layers"):
        Subnet((0, 1), (torch.tensor([1]),))
    with pytest.raises(ValueError, match="at most 2 of 3 layers"):
        droppable_layers(lambda choice: 0.0, 3, 3)
    with pytest.raises(ValueError, match=r"width must lie in 1\.\.24"):
        strongest(unit_importance(dense, TOKENS), [0], 25)
