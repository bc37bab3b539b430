"""Large tables that token ids look up: their rows are read from the disk, the resident model's bits stay."""

import threading

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

import offload
from moe import MoEForCausalLM
from offload.checkpoint.experts import ExpertLayer, Parameter, Source
from offload.checkpoint.tensors import read_header
from offload.formats.plain import PlainForm
from offload.runtime.opening import open_headers
from offload.store import store as storing
from offload.store.store import ExpertStore
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
    options = {"layers": [0, 2], "rows": 61, "width": 8, "heads": 2}
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(architecture="engram", architecture_options=options)).bfloat16()
    model.save_pretrained(folder)
    return next(name for name, _ in model.named_modules() if name.endswith(".tables"))


@pytest.fixture
def engram(tmp_path, tiny_config):
    """A folder with tables in two of three layers, and the resident model."""
    folder, name = tmp_path, save_engram(tmp_path, tiny_config)
    return folder, name, AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture
def first_layer_saw(monkeypatch):
    """Counts of the window whenever a first decoder layer begins; `then` is called there, if it is given."""
    seen = []

    def watch(model, then=None):
        (first, *_), window = model.model.layers, model.offload.runtime.window

        def begin(*_):
            seen.append(dict(vars(window.counters)))
            if then is not None:
                then()

        return first.register_forward_pre_hook(begin)

    watch.seen = seen
    return watch


@pytest.mark.parametrize("save", ["gemma3n", "engram"])
def test_rows_of_tables_are_read_in_place_of_the_tables(save, tmp_path, request, first_layer_saw):
    if save == "gemma3n":
        folder, name = tmp_path, save_gemma3n(tmp_path)
        resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    else:
        folder, name, resident = request.getfixturevalue("engram")
    found = [guest.name for guest in open_headers(folder, None).guests.embeddings]
    assert name in found
    slots = {"cache_experts": 2} if save == "engram" else {}
    model = offload.load(folder, resident_layers=2 if save == "gemma3n" else 0, **slots)
    first_layer_saw(model)
    table = model.get_submodule(name)
    assert next(table.parameters()).untyped_storage().nbytes() < 64
    expected = logits(resident)
    assert torch.equal(logits(model), expected)
    first = window_of(model)
    assert torch.equal(logits(model), expected)
    second = window_of(model)
    assert second["rows"] > first["rows"]
    assert second["rows_read"] == first["rows_read"] > 0
    assert torch.equal(tokens(model), tokens(resident))
    last = window_of(model)
    # no layer asked for a row whose reading had not begun when the first one did, in the prompt and in each token
    assert last["rows_ahead"] == last["rows_read"] > second["rows_read"]
    reads = [seen["rows_read"] for seen in first_layer_saw.seen]
    assert reads == sorted(reads)
    assert (reads[0], reads[-1]) == (first["rows_read"], last["rows_read"])
    model.offload.close()


def test_rows_come_in_turns_and_those_of_an_interrupted_pass_are_not_taken_for_others(
    engram, first_layer_saw, monkeypatch
):
    folder, _, resident = engram
    # so few rows are kept that those on their way have to leave
    monkeypatch.setattr("offload.window.planning.KEPT_BYTES", 1)
    monkeypatch.setattr("offload.window.planning.ROWS", 5)
    model = offload.load(folder, resident_layers=0, cache_experts=2, io="cached")
    plan = model.offload.runtime.window.plan
    assert plan.row_bytes == sum(5 * table.form.expert_bytes for table in plan.tables)
    may_read, read = threading.Event(), storing.read_into

    def slowly(file, descriptor, offset, target):
        if len(target) == 16:  # a row of a table
            may_read.wait(10)
        read(file, descriptor, offset, target)

    def stop():
        threading.Timer(0.02, may_read.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(storing, "read_into", slowly)
    hook = first_layer_saw(model, stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(torch.arange(90)[None], use_cache=False)
    assert first_layer_saw.seen[-1]["rows_ahead"] == 3 * 5, "reads of that pass wait, or are on their way"
    hook.remove()
    for _ in range(2):
        assert torch.equal(logits(model), logits(resident))
    found = window_of(model)
    assert 15 < found["rows_ahead"] < found["rows_read"]
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


@pytest.fixture(params=["cached", "direct"])
def table(request, tmp_path):
    """A store with one table of 40 rows of 24 numbers, its numbers, and who waits for reads."""
    row_ND = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    save_file({"pad": torch.zeros(3), "table": row_ND}, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["table"]
    source = Source("table", (entry,) * 40, is_fused=True)
    row = Parameter("weight", "table.weight", (24,), torch.float32, (source,), None, ((0, 0, 0, 24),))
    form = PlainForm(ExpertLayer("table", 40, (row,)))
    opened = ExpertStore(None, [form], is_direct=request.param == "direct")
    yield opened, row_ND
    opened.close()


def test_kept_rows_give_up_those_that_were_not_used_for_longest(table):
    opened, row_ND = table
    kept = KeptRows(opened, 0, 3)

    def take(rows):
        kept.ask(rows, is_demand=True)
        return kept.take(rows, lambda ticket: ticket.wait())

    assert torch.equal(take([5, 7, 39]), row_ND[[5, 7, 39]])
    assert torch.equal(take([7]), row_ND[[7]])
    assert kept.ask([0], is_demand=False) == 1, "in place of row 5"
    assert kept.ask([39, 7], is_demand=False) == 0, "asked for now, so row 0 was not used for longest"
    assert kept.ask([5], is_demand=False) == 1
    assert torch.equal(take([39, 5, 7]), row_ND[[39, 5, 7]])
    assert kept.ask([0], is_demand=False) == 1
    kept.clear()
    assert kept.ask([7, 5], is_demand=False) == 2
    assert torch.equal(take([5, 7]), row_ND[[5, 7]])


def test_a_place_is_given_on_when_nothing_is_written_to_it_any_more(table, monkeypatch):
    opened, row_ND = table
    kept, may_read, passed = KeptRows(opened, 0, 2), threading.Event(), threading.Event()
    jobs_of = opened._jobs

    def late(*arguments):
        return [lambda job=job: (may_read.wait(10), job()) for job in jobs_of(*arguments)]

    monkeypatch.setattr(opened, "_jobs", late)
    kept.ask([3, 4], is_demand=False)
    monkeypatch.setattr(opened, "_jobs", jobs_of)
    asking = threading.Thread(target=lambda: (kept.ask([8, 9], is_demand=True), passed.set()))
    asking.start()
    assert not passed.wait(0.05), "rows 3 and 4 are still being read to where 8 and 9 have to go"
    may_read.set()
    asking.join(10)
    assert torch.equal(kept.take([8, 9], lambda ticket: ticket.wait()), row_ND[[8, 9]])
