"""The variants of latent experts, MoE-X and Read-ME cost a token what the preset's plain experts cost."""

import pytest
import torch

from experiments.compare_flops import Usage, token_flops
from experiments.compare_variants import model_overrides
from experiments.presets import preset
from moe import MoEConfig, MoEForCausalLM


def expert_flops(variant):
    settings = model_overrides(variant, dict(preset("routers").model))
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig(**settings))
    config = model.config
    load_E = torch.full((config.num_experts,), config.num_experts_per_tok / config.num_experts)
    usage = Usage(loads=[load_E] * len(model.model.routers), router_passes=[1.0] * len(model.model.routers))
    return token_flops(model, usage, sequence_length=128).experts


@pytest.mark.parametrize("variant", ["latent", "latent-half", "moe-x", "read-me", "read-me-weighted"])
def test_active_operations_of_experts_match(variant):
    assert expert_flops(variant) == pytest.approx(expert_flops("top2"), rel=0.05)


def test_latent_experts_by_hand():
    config = MoEConfig(
        hidden_size=8, moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
        architecture="latent", architecture_options={"group": 2, "rank": 3},
    )  # fmt: skip
    experts = MoEForCausalLM(config).model.moe_layers[0].experts
    own = 2 * (2 * 4 * 3) + 2 * (4 * 8)
    basis = 2 * 2 * 3 * 8
    assert experts.flops(torch.tensor([0.5, 0.5, 0.5, 0.5])) == 2 * own + 2 * basis
    assert experts.flops(torch.tensor([1.0, 1.0, 0.0, 0.0])) == 2 * own + basis
    assert experts.flops(torch.tensor([0.25, 0.0, 0.0, 0.0])) == 0.25 * own + 0.25 * basis
