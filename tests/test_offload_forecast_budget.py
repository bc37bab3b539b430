"""`fit` and `load` divide memory by the same arithmetic, and say what would do."""

import numpy as np
import pytest

import offload
from offload.forecast.fit import fit
from offload.memory.budget import resident_bytes
from offload.runtime import activations, opening
from offload.runtime.needs import memory_needs
from offload.runtime.opening import open_checkpoint, open_headers
from offload.runtime.options import LoadOptions
from routing.ground.quantity import parse_size
from routing.traces import RoutingTrace
from tests.offloaded_process import save_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"vocab_size": 512, "hidden_size": 512, "moe_intermediate_size": 1024}
    return save_model("qwen3_moe", tmp_path_factory.mktemp("fit"), **sizes)


@pytest.fixture
def steady(monkeypatch):
    """The process has the same size at each look; it would grow a little by what the test itself holds."""
    monkeypatch.setattr(opening, "resident_bytes", lambda: 450 * MIB)


@pytest.mark.usefixtures("steady")
def test_the_least_budget_of_fit_works_in_load_and_one_mib_less_does_not(folder):
    budgets = fit(folder, cpu_memory="100MiB").budgets
    assert fit(folder, cpu_memory=budgets.least_bytes).plan is not None
    assert fit(folder, cpu_memory=budgets.least_bytes - MIB).plan is None
    model = offload.load(folder, cpu_memory=budgets.least_bytes)
    assert set(model.offload.report()["slots_per_layer"]) == {2}
    model.offload.close()
    with pytest.raises(ValueError, match="give at least") as refused:
        offload.load(folder, cpu_memory=budgets.least_bytes - MIB)
    named = parse_size(str(refused.value).split("give at least ")[1].split(";")[0])
    assert 0 <= named - budgets.least_bytes <= MIB


@pytest.mark.usefixtures("steady")
def test_the_budget_that_holds_all_experts(folder):
    budgets = fit(folder).budgets
    fitted = fit(folder, cpu_memory=budgets.all_bytes)
    assert fitted.as_json()["share_of_experts_in_memory"] == 1
    assert (fitted.as_json()["least_bytes"], fitted.as_json()["all_bytes"]) == (budgets.least_bytes, budgets.all_bytes)
    assert sum(fit(folder, cpu_memory=budgets.all_bytes - MIB).plan.num_slots) < 4 * 16


def test_a_refusal_says_what_the_process_held_before_this_model(folder):
    held = bytearray(b"1") * (300 * MIB)  # as another model would
    with pytest.raises(ValueError, match="before this model") as refused:
        offload.load(folder, cpu_memory="200MiB")
    said = parse_size(str(refused.value).split("the process holds ")[1].split(" before")[0])
    assert said == pytest.approx(resident_bytes(), rel=0.1)
    assert said > len(held)


def test_prompts_in_pieces_give_what_the_resident_model_gives_with_the_same_pieces(tmp_path, monkeypatch):
    import torch

    from experiments.evidence.resident import load_resident

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
    folder = save_model("gpt_oss", tmp_path, **sizes)
    monkeypatch.setattr(activations, "MOST_PIECE_BYTES", 2 * MIB)
    model, resident = offload.load(folder, context=512), load_resident(folder)
    assert model.generation_config.prefill_chunk_size == 128
    passed: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: passed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompt = torch.randint(3, 96, (1, 300), generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    asked |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    found = model.generate(prompt, **asked)
    assert passed == [128, 128, 44, 1, 1, 1]
    expected = resident.generate(prompt, prefill_chunk_size=128, **asked)
    with pytest.raises(ValueError, match=r"use_cache=False computes whole texts at once.*smaller context"):
        model.generate(prompt, use_cache=False, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


def test_classes_with_a_cache_of_their_own_are_not_read_in_pieces(tmp_path, monkeypatch):
    import torch

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
    folder = save_model("minimax", tmp_path, **sizes)
    monkeypatch.setattr(activations, "MOST_PIECE_BYTES", MIB)
    model = offload.load(folder, context=512)
    prompt = torch.arange(3, 90)[None]
    asked = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
    assert model.generate(prompt, max_new_tokens=2, **asked).shape == (1, 89)
    assert fit(folder, context=512).needs.activation_bytes > fit(folder, context=128).needs.activation_bytes


@pytest.mark.parametrize("model_type", ["hy_v4", "qwen3_moe"])
def test_headers_foretell_the_weights_that_loading_keeps_wide(model_type, tmp_path):
    """The head of the first family stays in float32 when it is loaded in bfloat16."""
    folder = save_model(model_type, tmp_path, vocab_size=512, hidden_size=64)
    options = LoadOptions(path_or_id=folder)
    foretold, found = (memory_needs(one, options) for one in (open_headers(folder, None), open_checkpoint(options)))
    assert foretold.weight_bytes == found.weight_bytes


@pytest.mark.usefixtures("steady")
def test_the_hit_rate_of_a_trace_is_that_of_the_default_policy_at_the_slots_of_the_budget(folder):
    expert_TLK = np.random.default_rng(0).integers(0, 16, (60, 4, 2)).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(60, np.int32), metadata={"num_experts": 16})
    budgets = fit(folder).budgets
    for share in (0.0, 0.4, 1.0):
        limit = budgets.least_bytes + int(share * (budgets.all_bytes - budgets.least_bytes))
        fitted = fit(folder, cpu_memory=limit)
        by_slots = {slots: offload.simulate(trace, slots, policies=("learned",))["learned"] for slots in range(1, 17)}
        rows = list(enumerate(fitted.plan.num_slots))
        hits = sum(int(by_slots[slots].hits_L[layer]) for layer, slots in rows)
        assert fitted.traced_hit_rate(trace) == hits / sum(int(by_slots[2].accesses_L[layer]) for layer, _ in rows)
    assert fit(folder, cpu_memory=budgets.all_bytes).traced_hit_rate(trace) > 0.8  # only first uses miss
    with pytest.raises(ValueError, match="the trace has 3 layers of 16 experts, the model 4 of 16"):
        fitted.traced_hit_rate(
            RoutingTrace(expert_TLK=expert_TLK[:, :3], sequence_T=np.zeros(60, np.int32), metadata={"num_experts": 16})
        )
