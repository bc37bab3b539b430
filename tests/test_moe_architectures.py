"""What every architecture promises: decoding with a cache equals the prefill, and a checkpoint keeps the logits."""

import pytest
import torch
from transformers import AutoConfig

from experiments.evidence.resident import load_resident
from moe import ARCHITECTURES, MoEConfig, MoEForCausalLM

README = {"expert_widths": [16, 8, 24], "permanent_widths": [8, 16, 0]}
README |= {"router_width": 16, "router_heads": 2, "router_ffn": 12}
MEMORY = {"num_experts_per_tok": 3, "num_shared_experts": 1}
RECURSION = {"num_hidden_layers": 4, "intermediate_size": 40}
CHAIN = {"num_shared_experts": 1, "balance_loss_weight": 0.1}

CASES = {
    "moe": [
        {},
        {"num_dense_layers": 1},
        {"num_shared_experts": 2},
        {"zero_compute_experts": ["zero", "copy", "constant", "constant"], "num_experts_per_tok": 3},
        {"tie_word_embeddings": True},
        {"qk_norm": "none"},
        {"qk_norm": "full"},
        {"router": "deepseek_v3", "router_options": {"num_groups": 3, "groups_kept": 2}},
        {"router": "switch", "num_experts_per_tok": 1},
    ],
    "chain_of_experts": [
        {"options": {"iterations": 2}} | CHAIN,
        {"options": {"iterations": 2, "residual": "normed"}} | CHAIN,
        {"options": {"iterations": 3}} | CHAIN,
        {"options": {"iterations": 3, "residual": "normed", "shared_gate": True}} | CHAIN,
    ],
    "duo_llm": [
        {"options": {"small_width": 8}},
        {"options": {"small_width": 8, "skip": True}},
        {"options": {"small_width": 8, "skip": True, "stage": "router"}},
    ],
    "mixture_of_recursions": [
        {"options": {"feed_forward": "dense", **options}} | RECURSION
        for options in (
            {"choice": "expert"},
            {"choice": "expert", "keys": "first", "recursions": 3},
            {"choice": "expert", "predictor": "separate", "router": "mlp"},
            {"choice": "token", "recursions": 3},
            {"choice": "token", "balance": "bias", "score": "sigmoid", "keys": "first"},
            {"choice": "none", "recursions": 3},
            {"choice": "none", "keys": "first"},
            {"choice": "expert", "feed_forward": "moe", "recursions": 3},
            {"choice": "token", "feed_forward": "moe", "keys": "first"},
        )
    ],
    "latent": [{"options": {"group": 4, "rank": 5}, "router": router} for router in ("mixtral", "rmoe", "pregate")],
    "readme": [{"options": README, "num_experts_per_tok": 1}],
    "moex": [{"num_shared_experts": 1}],
    "hydra": [{"options": {"chunk": 3}}, {"options": {"pooling": "prefix"}}],
    "mode": [{"router": "qwen3_moe"}, {"options": {"reads": "token_and_condition"}}],
    "glider": [{"router": "qwen3_moe"}],
    "feature_groups": [{"options": {"shared_width": 8}, "router": "mixtral"}],
    "mixture_of_transformers": [{"options": {"first_ids": [0, 30, 60]}, "num_experts": 3, "num_experts_per_tok": 1}],
    "peer": [{"options": {"num_heads": 2, "key_width": 8}, "num_experts": 49} | MEMORY],
    "ultramem": [
        {"options": {"key_width": 8, "pre_value_width": 6, "value_width": 10, "layers_per_table": 2}}
        | {"num_experts": 36}
        | MEMORY
    ],
}


@pytest.fixture(params=[(name, number) for name, cases in CASES.items() for number in range(len(cases))], ids=str)
def model(request, tiny_config):
    name, number = request.param
    case = dict(CASES[name][number])
    config = tiny_config(architecture=name, architecture_options=case.pop("options", {}), **case)
    return MoEForCausalLM(config).eval()


def inputs_of(model, token_BS):
    """What a call takes besides tokens."""
    takes_condition = model.config.architecture == "mode"
    return {"condition": torch.randn(len(token_BS), 32, dtype=model.dtype)} if takes_condition else {}


def test_every_architecture_is_here():
    assert CASES.keys() == ARCHITECTURES.keys()


def test_decoding_with_a_cache_equals_the_prefill_column_by_column(model, tolerance):
    model, token_BS = model.double(), torch.randint(96, (3, 11))
    extra = inputs_of(model, token_BS)
    with torch.no_grad():
        whole = model(token_BS, **extra).logits
        for prompt in (1, 4):
            step = model(token_BS[:, :prompt], use_cache=True, **extra)
            torch.testing.assert_close(step.logits, whole[:, :prompt], **tolerance[torch.float64])
            for position in range(prompt, 11):
                cache = step.past_key_values
                step = model(token_BS[:, position : position + 1], past_key_values=cache, use_cache=True, **extra)
                torch.testing.assert_close(step.logits[:, 0], whole[:, position], **tolerance[torch.float64])


def test_a_checkpoint_round_trip_keeps_the_logits(model, tmp_path):
    token_BS = torch.randint(96, (2, 13))
    extra = inputs_of(model, token_BS)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEConfig)
    loaded = load_resident(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(token_BS, **extra).logits, loaded(token_BS, **extra).logits)
