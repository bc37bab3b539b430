"""Layers that are routed by a hash of the token id: their experts are on their way before the pass begins."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.prefetch.hashed_layers import find_tables
from tests.quantised_checkpoints import logits_of
from tests.test_offload_formats_families import WIDTHS
from tests.test_offload_runtime_families import _small_model

KINDS = ["hash_moe", "hash_moe", "moe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DeepSeek-V4 with a random table in each hash-routed layer."""
    model = _small_model("deepseek_v4", torch.bfloat16, WIDTHS | {"mlp_layer_types": KINDS})
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        if layer.mlp.is_hash:
            table = layer.mlp.gate.tid2eid
            chosen = torch.rand(len(table), model.config.n_routed_experts, generator=generator).topk(table.shape[1])
            table.copy_(chosen.indices)
    path = tmp_path_factory.mktemp("hashed")
    model.save_pretrained(path)
    return path


def test_reads_begin_before_the_embedding_and_are_of_use(folder):
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    is_hash = [layer.mlp.is_hash for layer in resident.model.layers]
    assert any(is_hash)
    assert not all(is_hash)
    slots = 2 * resident.config.num_experts_per_tok
    model = offload.load(folder, cache_experts=slots)
    layers, begun = model.offload.runtime.layers, []
    tables = find_tables(model, [slots.form.layer for slots in layers])
    assert [number in tables for number in range(len(layers))] == is_hash

    def note(module, args):
        begun.append([slots.ahead_counters.issued for slots in layers])

    model.get_input_embeddings().register_forward_pre_hook(note)
    for token in (5, 9, 5, 3):
        ids = torch.tensor([[token]])
        assert torch.equal(logits_of(model, ids), logits_of(resident, ids))
    for number, hashed in enumerate(is_hash):
        assert (begun[0][number] == resident.config.num_experts_per_tok) == hashed
        ahead = layers[number].ahead_counters
        assert ahead.issued == begun[-1][number] == ahead.useful + ahead.late
        assert ahead.wasted == 0
    model.offload.close()


@pytest.mark.slow
def test_prompts_embeddings_and_unknown_ids_pass_as_before(folder):
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = offload.load(folder, cache_experts=2)
    ids = torch.arange(12)[None]
    assert torch.equal(logits_of(model, ids), logits_of(resident, ids))
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert torch.equal(logits_of(model, ids), logits_of(resident, ids))
    off = offload.load(folder, cache_experts=4, prefetch="off")
    assert torch.equal(logits_of(off, ids), logits_of(resident, ids))
    assert not any(slots.ahead_counters.issued for slots in off.offload.runtime.layers)


def test_models_without_tables_have_none(tmp_path):
    _small_model("qwen3_moe", torch.bfloat16, WIDTHS).save_pretrained(tmp_path)
    model = offload.load(tmp_path, cache_experts=2)
    assert find_tables(model, [slots.form.layer for slots in model.offload.runtime.layers]) == {}
