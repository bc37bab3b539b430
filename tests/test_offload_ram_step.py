"""The short way of a token whose experts are all in their slots: the results, counts and order of the long one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import offload
from offload.cache.learned import LearnedReuse
from offload.runtime import runtime

TOKENS = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(3)).tolist()
EXPERTS, TOP_K, LAYERS = 8, 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def decode(folder, **options):
    """Logits of each token, what was counted, and what the policy of each layer would evict next."""
    model = offload.load(folder, **options)
    logits = []
    with torch.no_grad():
        past = model(torch.tensor([TOKENS[:3]]), use_cache=True).past_key_values
        for token in TOKENS[3:]:
            logits.append(model(torch.tensor([[token]]), past_key_values=past).logits)
    report, slots = model.offload.report(), model.offload._runtime.layers
    ranks = [[each.cache.rank(expert) for expert in range(EXPERTS)] for each in slots]
    model.offload.close()
    return torch.cat(logits), {name: report[name] for name in ("hits", "misses", "bytes_read")}, ranks


@pytest.mark.parametrize("slots", [3, 6, EXPERTS])
def test_both_ways_give_the_same(folder, slots, monkeypatch):
    short = decode(folder, cache_experts=slots)
    monkeypatch.setattr(runtime, "compute_hits", lambda *given: False)
    long = decode(folder, cache_experts=slots)
    assert torch.equal(short[0], long[0])
    assert short[1:] == long[1:]
    assert sum(short[1][name] for name in ("hits", "misses")) >= LAYERS * TOP_K * (len(TOKENS) - 3)


def test_no_policy_is_asked_where_every_expert_has_a_slot(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(LearnedReuse, "demand", lambda cache, keys, *rest: asked.append(keys))
    decode(folder, cache_experts=EXPERTS)
    assert not asked
    decode(folder, cache_experts=EXPERTS - 1)
    assert len(asked) == LAYERS * len(TOKENS)


def test_reads_ahead_are_settled_before_a_token_takes_the_short_way(folder):
    model = offload.load(folder, cache_experts=EXPERTS)
    slots = model.offload._runtime.layers[0]
    with torch.no_grad():
        model(torch.tensor([[5]]))
    there = [expert for expert in range(EXPERTS) if expert in slots]
    assert slots.all_of(there) == [slots.matrices(expert) for expert in there]
    missing = next(expert for expert in range(EXPERTS) if expert not in slots)
    assert slots.all_of([missing]) is None
    assert slots.read_ahead(missing, (), 2)
    assert slots.all_of(there) is None
    slots._ahead[missing].wait()
    slots.settle_ahead((), None)
    assert slots.all_of(there) is not None
    assert slots.all_of([missing]) is None, "it is not proven yet that reading it was of use"
    model.offload.close()
