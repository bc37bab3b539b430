"""Linear layers that stay as their checkpoint stores them: which do, what they compute, what is counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.compute.resident import weight_bytes
from offload.formats.resident.linears import find_stored
from offload.formats.resident.stored_weight import StoredWeight, kernel_matrix
from offload.runtime.division import needs_of, stored_shapes
from offload.runtime.opening import open_headers
from offload.runtime.options import LoadOptions
from tests.quantised_checkpoints import logits_of
from tests.quantised_formats import FORMATS
from tests.test_offload_formats_quantised import TOKENS, make_folders

QUICK = ("fp8 blocks F32",)
NOT_HELD = ("gptq sorted", "int4 sorted", "hqq axis 0", "hqq across rows", "hqq 3 bits", "hqq 2 bits", "hqq 1 bit")
"""Forms that our C does not multiply from."""


def stored_names(model):
    return [name for name, weight in model.named_parameters() if isinstance(weight, StoredWeight)]


@pytest.mark.parametrize(
    "format_name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)
def test_attention_stays_stored_and_logits_are_those_of_the_plain_model(format_name, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = make_folders(tmp_path, format_name)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    model = offload.load(folder, cache_experts=2)
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "qkvo"]
    assert stored_names(model) == ([] if format_name in NOT_HELD else names)
    for tokens in (TOKENS, TOKENS[:, :1], TOKENS.T):
        assert torch.equal(logits_of(model, tokens), logits_of(resident, tokens))
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **greedy), resident.generate(TOKENS, **greedy))
    model.offload.close()


def test_stored_bytes_are_counted_and_foretold(tmp_path):
    folder, _ = make_folders(tmp_path, "fp8 blocks F32")
    options = LoadOptions(path_or_id=folder)
    foretold = needs_of(open_headers(folder, None, stored_shapes(options)), options).weight_bytes
    plain = needs_of(open_headers(folder, None), options).weight_bytes
    model = offload.load(folder, cache_experts=2)
    saved = sum(weight.nbytes - weight.stored.nbytes for weight in map(model.get_parameter, stored_names(model)))
    assert saved > 0.4 * sum(model.get_parameter(name).nbytes for name in stored_names(model))
    assert foretold == plain - saved == weight_bytes(model)
    report = model.offload.report()
    assert report["memory"]["weight_bytes"] == foretold
    assert report["stored_linears"] == {"fp8": 8}


def test_single_tokens_are_multiplied_from_their_codes(tmp_path, monkeypatch):
    folder, _ = make_folders(tmp_path, "fp8 blocks F32")
    model = offload.load(folder, cache_experts=2, arithmetic="fixed")
    attention = model.model.layers[0].self_attn
    queries, keys = (kernel_matrix(linear.weight) for linear in (attention.q_proj, attention.k_proj))
    assert queries.rows != keys.rows
    assert queries.parameter is keys.parameter  # so that one call multiplies both
    monkeypatch.setattr(StoredWeight, "expanded", lambda weight: pytest.fail("expanded"))
    logits_of(model, TOKENS[:, :1])


def test_layers_of_which_torch_computes_the_products_are_expanded(tmp_path):
    folder, _ = make_folders(tmp_path, "fp8 blocks F32")
    opened = open_headers(folder, None)
    assert not opened.stored
    asked = []
    assert find_stored(opened.model, lambda name: asked.append(name), lambda shape: shape[0] == 32) == {}
    assert asked == [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in "kv"]
