import pytest
import torch

from experiments.compare.measures.hidden_units import coverage, hidden_metrics, hidden_units
from moe import MoEForCausalLM


def test_coverage_by_hand():
    token_T = torch.tensor([0, 1] * 20)
    perfect_TF = torch.stack([(token_T == 0).float(), (token_T == 1).float()], dim=1)
    assert coverage(perfect_TF, token_T, 2) == 1.0
    blind_TF = torch.ones(40, 1)
    assert coverage(blind_TF, token_T, 2) == pytest.approx(2 * 20 / (40 + 20)), "always says yes"
    graded_TF = torch.where(token_T == 0, 1.0, 0.5)[:, None]
    assert coverage(graded_TF, token_T, 2) == pytest.approx((1.0 + 2 / 3) / 2), "a threshold tells id 0"
    assert coverage(perfect_TF[:30], token_T[:30], 2) != coverage(perfect_TF[:30], token_T[:30], 2), "NaN: too few"


def test_relu_experts_are_sparse_and_gated_ones_are_not(tiny_config):
    token_BS = torch.randint(96, (4, 64))
    relu = hidden_metrics(MoEForCausalLM(tiny_config(architecture="moex")).eval(), token_BS)
    gated = hidden_metrics(MoEForCausalLM(tiny_config()).eval(), token_BS)
    assert gated["active_hidden"] == 1.0
    assert gated["active_units"] == 2 * 24
    assert relu["active_hidden"] < 0.5, "routed to where fewest units fire"
    assert relu["active_units"] == pytest.approx(relu["active_hidden"] * 2 * 24)
    latent = hidden_metrics(MoEForCausalLM(tiny_config(architecture="latent")).eval(), token_BS)
    assert all(value != value for value in latent.values()), "its experts do not read the token itself"


def test_hidden_units_of_experts_not_visited_are_zero(tiny_config):
    experts = MoEForCausalLM(tiny_config(architecture="moex")).model.moe_layers[0].experts
    x_TD, expert_TK = torch.randn(5, 32), torch.tensor([[0, 1], [2, 6], [6, 6], [5, 4], [3, 0]])
    hidden_TEF = hidden_units(experts, x_TD, expert_TK)
    for token, ids in enumerate(expert_TK.tolist()):
        for expert in range(6):
            expected = (experts.up_proj[expert] @ x_TD[token]).relu() if expert in ids else torch.zeros(24)
            torch.testing.assert_close(hidden_TEF[token, expert], expected)
