"""What every architecture promises: decoding with a cache equals the prefill, and a checkpoint keeps the logits."""

import pytest
import torch
from transformers import AutoConfig

from experiments.evidence.resident import load_resident
from moe import ARCHITECTURES, MoEConfig, MoEForCausalLM

RECURSION = {"num_hidden_layers": 4, "intermediate_size": 40}
CHAIN = {"num_shared_experts": 1, "balance_loss_weight": 0.1}

# besides the example of each row
MORE = {
    "moe": [
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
        {"options": {"iterations": 2, "residual": "normed"}} | CHAIN,
        {"options": {"iterations": 3}} | CHAIN,
        {"options": {"iterations": 3, "residual": "normed", "shared_gate": True}} | CHAIN,
    ],
    "duo_llm": [
        {"options": {"small_width": 8, "skip": True}},
        {"options": {"small_width": 8, "skip": True, "stage": "router"}},
    ],
    "mixture_of_recursions": [
        {"options": {"feed_forward": "dense", **options}} | RECURSION
        for options in (
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
    "latent": [{"options": {"group": 4, "rank": 5}, "router": router} for router in ("rmoe", "pregate")],
    "ladder": [{"num_dense_layers": 1, "num_shared_experts": 1}],
    "shortcut": [{"num_dense_layers": 1, "num_shared_experts": 1}],
    "parallel_streams": [{"options": {"streams": 3, "prefix": 0}}, {"options": {"streams": 1, "prefix": 2}}],
    "feature_groups": [{"options": {"shared_width": 8, "attention": True}, "router": "mixtral"}],
    "hydra": [
        {"options": {"pooling": "prefix"}},
        {"options": {"chunk": 3, "memory": 25, "memory_top_k": 3, "memory_key_width": 8}},
    ],
    "mode": [{"options": {"reads": "token_and_condition", "attends": True}}],
}


def example_of(name):
    """The use of an architecture that its row gives as an example."""
    example = dict(ARCHITECTURES[name].example)
    return {"options": dict(example.pop("architecture_options", {})), **example}


CASES = {name: [example_of(name), *MORE.get(name, [])] for name in ARCHITECTURES}


@pytest.fixture(params=[(name, number) for name, cases in CASES.items() for number in range(len(cases))], ids=str)
def model(request, tiny_config):
    name, number = request.param
    return build(tiny_config, name, CASES[name][number])


def build(tiny_config, name, case):
    case = dict(case)
    config = tiny_config(architecture=name, architecture_options=case.pop("options", {}), **case)
    return MoEForCausalLM(config).eval()


def inputs_of(model, token_BS):
    """What a call takes besides tokens."""
    takes_condition = model.config.architecture == "mode"
    return {"condition": torch.randn(len(token_BS), 32, dtype=model.dtype)} if takes_condition else {}


def test_decoding_with_a_cache_equals_the_prefill_column_by_column(model, tolerance):
    model, token_BS = model.double(), torch.randint(96, (3, 8))
    extra = inputs_of(model, token_BS)
    with torch.no_grad():
        whole = model(token_BS, **extra).logits
        for prompt in (1, 4):
            step = model(token_BS[:, :prompt], use_cache=True, **extra)
            torch.testing.assert_close(step.logits, whole[:, :prompt], **tolerance[torch.float64])
            for position in range(prompt, 8):
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
