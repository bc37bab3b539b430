"""The variants of latent experts, MoE-X and Read-ME cost a token what the preset's plain experts cost."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.compare.measures.choices import router_metrics
from experiments.compare.measures.flops import Usage, router_flops, token_flops
from experiments.compare.summary import METRICS
from experiments.train.corpus import load_corpus
from experiments.train.presets import preset
from experiments.train.torch_run import train
from experiments.variants.catalogue import model_overrides
from moe import MoEConfig, MoEForCausalLM

VARIANTS = ["latent", "latent-half", "moe-x", "read-me", "read-me-weighted"]


def expert_flops(variant):
    settings = model_overrides(variant, dict(preset("routers").model))
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig(**settings))
    config = model.config
    load_E = torch.full((config.num_experts,), config.num_experts_per_tok / config.num_experts)
    usage = Usage(loads=[load_E] * len(model.model.routers), router_passes=[1.0] * len(model.model.routers))
    return token_flops(model, usage, sequence_length=128).experts


@pytest.mark.parametrize("variant", VARIANTS)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_are_measured(variant, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n}: {n * n % 97} and {n * 31 % 89}\n" for n in range(1500)))
    base = preset("smoke")
    model = base.model | {"hidden_size": 32, "head_dim": 16, "moe_intermediate_size": 16}
    config = replace(
        base, model=model_overrides(variant, model), steps=4, batch_size=2, sequence_length=32, warmup_steps=1,
        evaluate_every=2, checkpoint_every=2, held_out_tokens=256, precision="float32",
    )  # fmt: skip
    corpus = load_corpus(str(text))
    train(config, corpus, tmp_path / "run", quiet=True)
    trained = MoEForCausalLM.from_pretrained(next((tmp_path / "run").rglob("config.json")).parent).eval()
    scores = router_metrics(trained, corpus, sequence_length=32, max_tokens=512, batch_size=4)
    assert set(METRICS) - {"held_out_bits_per_byte", "tokens_per_second", "cloze", "copying"} <= set(scores)
    reads_latents = variant.startswith("latent")
    for name, value in scores.items():
        is_hidden = name in ("active_hidden", "active_units", "byte_coverage")
        assert value is None if is_hidden and reads_latents else math.isfinite(value), name


def test_the_table_of_a_token_router_is_read_not_multiplied():
    config = MoEConfig(
        hidden_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=1, num_hidden_layers=2,
        architecture="readme", architecture_options={"router_width": 8, "router_heads": 2, "router_ffn": 5},
    )  # fmt: skip
    assert router_flops(MoEForCausalLM(config)) == 2 * (4 * 8 * 8 + 3 * 8 * 5 + 8 * 4)
