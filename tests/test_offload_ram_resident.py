"""Resident routers in the runtime: the same tokens, and at most one read per token and layer, counted at the store."""

import pytest
import torch

import offload
from moe import MoEForCausalLM

RESIDENTS, NEW_TOKENS = 4, 40


@pytest.fixture(params=["now", "next", "pregate"])
def saved(request, tiny_config, tmp_path):
    """A model on disk, and how many slots hold what its routers name."""
    options = {"residents": RESIDENTS, "admits": "next" if request.param == "next" else "now"}
    router = "resident"
    if request.param == "pregate":
        router, options = "pregate", {"inner": "resident", "inner_options": options}
    config = tiny_config(router=router, router_options=options, num_experts=12)
    MoEForCausalLM(config).eval().save_pretrained(tmp_path)
    return tmp_path, RESIDENTS + (request.param == "next")


def reads_per_call(model, monkeypatch):
    """Reads of each layer in each later call of the model."""
    runtime, counts = model.offload.runtime, []
    read = runtime.store.read

    def counted(layer, *given, **named):
        counts[-1][layer] += 1
        return read(layer, *given, **named)

    monkeypatch.setattr(runtime.store, "read", counted)
    model.register_forward_pre_hook(lambda *_: counts.append([0] * len(runtime.layers)))
    return counts


def decode(model, token_S, prompt=5):
    """Logits of a prompt's end and of each later token, one call each."""
    step = model(token_S[None, :prompt], use_cache=True)
    logits = [step.logits[0, -1]]
    for token in token_S[prompt:]:
        step = model(token.view(1, 1), past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits[0, -1])
    return torch.stack(logits)


@torch.no_grad()
def test_at_most_one_read_per_token_and_layer_and_the_resident_models_logits(saved, monkeypatch):
    folder, slots = saved
    token_S = torch.randint(0, 96, (NEW_TOKENS,))
    expected = decode(MoEForCausalLM.from_pretrained(folder).eval(), token_S)
    counts = {}
    for prefetch in ("auto", "off"):
        model = offload.load(folder, cache_experts=slots, prefetch=prefetch)
        found = reads_per_call(model, monkeypatch)
        torch.testing.assert_close(decode(model, token_S), expected)
        # the prompt reads what it visits, and the first token after it what is missing of its residents
        counts[prefetch] = torch.tensor(found[2:])
        assert model.offload.report()["prefetch"]["is_active"] == (prefetch == "auto")
        model.offload.close()
    assert counts["auto"].max() == 1
    assert counts["auto"].sum() > 0


def test_a_swap_for_the_next_token_is_no_miss_of_this_one(tiny_config, tmp_path):
    """What the next token needs is on its way while this one is computed: no layer has to ask for it."""
    config = tiny_config(router="resident", router_options={"residents": RESIDENTS, "admits": "next"}, num_experts=12)
    MoEForCausalLM(config).eval().save_pretrained(tmp_path)
    model = offload.load(tmp_path, cache_experts=RESIDENTS + 1)
    runtime = model.offload.runtime
    step = model(torch.randint(0, 96, (1, 6)), use_cache=True)
    for number in range(20):
        for slots in runtime.layers:
            for ticket in slots._ahead.values():
                ticket.wait()
        misses = [layer.misses for layer in runtime.counters.layers]
        step = model(torch.randint(0, 96, (1, 1)), past_key_values=step.past_key_values, use_cache=True)
        if number > 0:
            assert [layer.misses for layer in runtime.counters.layers] == misses


def test_too_few_slots_and_several_sequences_still_give_the_right_tokens(saved):
    folder, _ = saved
    prompt, settings = torch.randint(0, 96, (3, 5)), {"max_new_tokens": 8, "do_sample": False}
    expected = MoEForCausalLM.from_pretrained(folder).eval().generate(prompt, **settings)
    for slots in (2, 7):
        assert torch.equal(offload.load(folder, cache_experts=slots).generate(prompt, **settings), expected)
