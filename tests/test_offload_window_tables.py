"""Large tables that token ids look up: their rows are read from the disk, the resident model's bits stay."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

import offload
from moe import MoEForCausalLM
from offload.runtime.opening import open_headers
from offload.window.kept_rows import KeptRows
from tests.test_offload_runtime_families import _small_model
from tests.test_offload_window import logits, tokens, window_of


def save_gemma3n(folder):
    """A dense model with an embedding of each layer for each token, which is scaled after it is looked up."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size": 64, "intermediate_size": 96}
    depth = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 0}
    config = Gemma3nTextConfig(**sizes, **depth, **heads, hidden_size_per_layer_input=16, laurel_rank=8)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return "model.embed_tokens_per_layer"


def save_engram(folder, tiny_config):
    options = {"layers": [0], "rows": 61, "width": 8, "heads": 2}
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(architecture="engram", architecture_options=options)).bfloat16()
    model.save_pretrained(folder)
    return next(name for name, _ in model.named_modules() if name.endswith(".tables"))


@pytest.mark.parametrize("save", ["gemma3n", "engram"])
def test_rows_of_tables_are_read_in_place_of_the_tables(save, tmp_path, tiny_config):
    name = save_gemma3n(tmp_path) if save == "gemma3n" else save_engram(tmp_path, tiny_config)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    found = [guest.name for guest in open_headers(tmp_path, None).guests.embeddings]
    assert name in found
    slots = {"cache_experts": 2} if save == "engram" else {}
    for resident_layers in (2,) if save == "gemma3n" else (0,):
        model = offload.load(tmp_path, resident_layers=resident_layers, **slots)
        table = model.get_submodule(name)
        assert next(table.parameters()).untyped_storage().nbytes() < 64
        expected = logits(resident)
        assert torch.equal(logits(model), expected)
        first = window_of(model)
        assert torch.equal(logits(model), expected)
        second = window_of(model)
        assert second["kept_rows"] - first["kept_rows"] == second["rows"] - first["rows"] > 0
        assert torch.equal(tokens(model), tokens(resident))
        model.offload.close()


def test_large_tables_are_first_to_leave_where_experts_do_not_all_fit(tmp_path, monkeypatch):
    _small_model("olmoe", torch.bfloat16).save_pretrained(tmp_path)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    whole = offload.load(tmp_path)
    assert "window" not in whole.offload.report()
    monkeypatch.setattr("offload.runtime.division.room_besides", lambda *args: 0)
    small = offload.load(tmp_path, cache_experts=2)
    assert "window" not in small.offload.report()  # its table is not worth it
    monkeypatch.setattr("offload.window.planning.LARGE_TABLE_BYTES", 1)
    model = offload.load(tmp_path, cache_experts=2)
    assert torch.equal(logits(model), logits(resident))
    found = window_of(model)
    assert found["streamed_layers"] == found["pass_bytes"] == 0
    assert found["rows"] > 0
    freed = model.get_submodule("model.embed_tokens").weight.numel() * 2
    weights = [each.offload.report()["memory"]["weight_bytes"] for each in (small, model)]
    assert weights[0] - weights[1] == freed


def test_kept_rows_give_up_the_one_that_was_not_used_for_longest():
    kept = KeptRows(2, (3,), torch.float32)
    for row in (5, 7):
        kept.put(row, torch.full((3,), float(row)))
    assert kept.take(5) is not None
    kept.put(9, torch.full((3,), 9.0))
    assert kept.take(7) is None
    assert [float(kept.take(row)[0]) for row in (5, 9)] == [5.0, 9.0]


def test_no_two_rows_share_a_place_whatever_is_put_again_or_interrupted():
    kept = KeptRows(2, (1,), torch.float32)
    kept.put(5, torch.tensor([5.0]))
    kept.put(5, torch.tensor([5.0]))
    kept.put(6, torch.tensor([6.0]))
    assert (kept.take(5).item(), kept.take(6).item()) == (5.0, 6.0)
    with pytest.raises(RuntimeError):
        kept.put(7, torch.zeros(2))  # a copy that fails in the middle, as an interrupt would
    kept.put(8, torch.tensor([8.0]))
    assert kept.take(7) is None
    assert {row: kept.take(row).item() for row in (5, 6, 8) if kept.take(row) is not None} == {8: 8.0}
    kept.clear()
    assert kept.take(8) is None
    kept.put(9, torch.tensor([9.0]))
    kept.put(10, torch.tensor([10.0]))
    assert (kept.take(9).item(), kept.take(10).item()) == (9.0, 10.0)
