"""Variants with memory layers and other signals: trained and measured like the others, at the preset's operations."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.compare.measures.choices import ROUTING_METRICS, router_metrics
from experiments.compare.measures.flops import Usage, parameters, token_flops
from experiments.train.corpus import load_corpus
from experiments.train.presets import preset
from experiments.train.torch_run import train
from experiments.variants.catalogue import model_overrides
from experiments.variants.memory_layers import MEMORY_VARIANTS
from moe import MoEConfig, MoEForCausalLM


def model_flops(model, experts_per_token):
    """With balanced experts."""
    E = model.config.num_experts
    loads = [torch.full((E,), experts_per_token / E) for _ in model.model.routers]
    return token_flops(model, Usage(loads=loads, router_passes=[1.0] * len(loads)), sequence_length=128)


@pytest.mark.parametrize("name", MEMORY_VARIANTS)
def test_variants_cost_what_the_preset_does(name):
    base = preset("routers").model
    with torch.device("meta"):
        plain = MoEForCausalLM(MoEConfig(**base))
        model = MoEForCausalLM(MoEConfig(**model_overrides(name, base)))
    expected = model_flops(plain, plain.config.num_experts_per_tok).total
    found = model_flops(model, model.config.num_experts_per_tok).total
    assert abs(found / expected - 1) < 0.06
    if name in ("peer", "ultramem"):
        sizes = [sum(p.numel() for p in m.parameters()) for m in (plain, model)]
        assert abs(sizes[1] / sizes[0] - 1) < 0.2


def test_operations_of_a_memory_layer_by_hand(tiny_config):
    """D 32; PEER: 2 heads, 3 neurons each, 7 rows and columns of sub-keys of 4; UltraMem: 2 ranks, 6 rows."""
    options = {"num_heads": 2, "key_width": 8}
    peer = MoEForCausalLM(
        tiny_config(architecture="peer", architecture_options=options, num_experts=49, num_experts_per_tok=3)
    )
    flops = model_flops(peer, 3)
    assert flops.experts == 3 * 2 * 3 * 2 * 2 * 32
    assert flops.router == 3 * (2 * 16 * 32 + 2 * (2 * 2 * 7 * 4 + 2 * 3 * 1 * (1 + 3)))
    assert parameters(peer, 6)["active"] == sum(p.numel() for p in peer.parameters()) - round(
        3 * 49 * 64 * (1 - 6 / 49)
    )
    options = {"key_width": 8, "pre_value_width": 6, "value_width": 10, "layers_per_table": 3}
    ultramem = MoEForCausalLM(
        tiny_config(architecture="ultramem", architecture_options=options, num_experts=36, num_experts_per_tok=3)
    )
    flops = model_flops(ultramem, 3)
    assert flops.experts == 3 * 2 * 3 * 16
    assert flops.shared == 3 * 2 * 32 * 16
    rows = 18
    active = sum(p.numel() for p in ultramem.parameters()) - round(rows * 16 * (1 - 9 / rows))
    assert parameters(ultramem, 3)["active"] == active


@pytest.mark.parametrize("name", MEMORY_VARIANTS)
def test_variants_train_and_are_measured(name, tmp_path):
    config = preset("smoke")
    model = config.model | {"hidden_size": 48, "num_experts": 4}
    config = replace(config, model=model_overrides(name, model), steps=2, sequence_length=32, precision="float32")
    config = replace(config, held_out_tokens=256, evaluate_every=2, checkpoint_every=2, batch_size=2)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again.\n" * 200)
    corpus = load_corpus(str(text))
    trained = train(config, corpus, tmp_path / "run", quiet=True)
    assert math.isfinite(trained.held_out_bits_per_byte)
    loaded = MoEForCausalLM.from_pretrained(tmp_path / "run").eval()
    measured = router_metrics(loaded, corpus, sequence_length=32, max_tokens=256, batch_size=2)
    assert measured["flops_per_token"] > 0
    assert measured["max_vio"] >= 0
    if name in ("peer", "ultramem"):
        per_layer = loaded.model.routers[0].num_heads * loaded.config.num_experts_per_tok
        assert measured["true_load"] == per_layer
        assert measured["lru_hit_rate"] is None
    else:
        assert all(math.isfinite(measured[metric]) for metric in ROUTING_METRICS)
