"""The bit router: it keeps its budget, spends bits where they matter, and is the same at every number of slots."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import offload
from offload.lowbit import bit_router
from offload.lowbit.bit_router import LayerRows, _judge, _train, _within
from offload.ram.bit_router import BitGate, router_file
from tests.quantised_checkpoints import logits_of, write_olmoe

TOKENS = torch.arange(24)[None] * 7 % 256
EXPERTS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder, with its packed copy in planes and that one's router beside it."""
    folder = write_olmoe(tmp_path_factory.mktemp("router") / "model", intermediate_size=64, num_experts=EXPERTS)
    book = folder.parent / "book.txt"
    book.write_text(" ".join(("expert", "router", "token", "layer")[(i * i + i // 5) % 4] for i in range(300)))
    inputs = offload.calibrate(folder, book, folder.parent / "inputs", tokens=512, length=64, needs_sensitivity=True)
    pack = folder.parent / "experts"
    offload.quantise_in_levels(folder, pack, form="planes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bit_router, "EPOCHS", 6)
        patch.setattr(bit_router, "MOST_ROWS", 200)
        result = offload.train_bit_router(folder, pack, inputs, bits=3.6)
    (folder.parent / "result.json").write_text(json.dumps(vars(result)))
    return folder


def loaded(model, **options):
    return offload.load(model, pack=model.parent / "experts", depth="router", **options)


def made_rows(seed, count=3000):
    """Rows whose second level is worth much where the first input is positive, or the expert is 1; else nothing."""
    chance = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(count, 8, generator=chance)
    expert_N = torch.randint(3, (count,), generator=chance)
    matters_N = (x_ND[:, 0] > 0) | (expert_N == 1)
    cost_NV = torch.stack([torch.where(matters_N, 1.0, 0.01), torch.full((count,), 0.005)], 1)
    return matters_N, LayerRows(x_ND.bfloat16(), expert_N, cost_NV, torch.ones(count), torch.tensor([2.0, 3.0]), 3)


def test_bits_go_where_they_matter_within_the_budget():
    matters_N, rows = made_rows(0)
    bits = 2 + float(matters_N.float().mean())
    gates = _within(_train([rows], bits, torch.Generator().manual_seed(0), lambda done: None), [rows], bits)
    tokens, all_bits, _ = rows.spent(gates[0].logits(rows.x_ND, rows.expert_N).argmax(-1))
    assert bits - 0.05 < all_bits / tokens <= bits + 1e-6
    matters_N, fresh = made_rows(1)
    deep_N = gates[0].logits(fresh.x_ND, fresh.expert_N).argmax(-1) == 1
    assert float((deep_N == matters_N).float().mean()) > 0.93
    result = _judge(gates, [fresh])
    assert result.cost < 0.3 * result.mixed_cost


def test_a_gate_chooses_by_token_and_expert():
    gate = BitGate(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    x_TD, expert_TK = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0, 1], [1, 2]])
    depths_TK = gate.depths(x_TD, expert_TK, torch.ones(2, 2), torch.zeros(2, dtype=torch.bool))
    assert depths_TK.tolist() == [[2, 2], [3, 3]]


def test_the_router_keeps_its_budget_when_the_model_runs(model):
    result = json.loads((model.parent / "result.json").read_text())
    assert result["bits"] == pytest.approx(3.6, abs=0.2)
    assert result["cost"] < result["mixed_cost"]
    running = loaded(model, cache_experts=EXPERTS)
    text = (model.parent / "book.txt").read_bytes()[:60]
    for token in text:
        logits_of(running, torch.tensor([[token]]))
    report = running.offload.report()["depth_rule"]
    assert report["rule"] == "router"
    assert report["is_lossy"]
    weights = 3 * 64 * 64
    ends = running.offload.runtime.layers[0].levels.level_ends
    rows = report["rows_by_depth"]
    bits = sum(count * 8 * ends[depth - 1] / weights for depth, count in rows.items()) / sum(rows.values())
    assert bits == pytest.approx(3.6, abs=0.5)


def test_the_same_bits_at_every_number_of_slots(model):
    prompts = (TOKENS, TOKENS[:, 3:4], TOKENS[:, 5:9])
    expected = [logits_of(loaded(model, cache_experts=EXPERTS), tokens) for tokens in prompts]
    for options in ({"cache_experts": 1, "io": "direct"}, {"cpu_memory": "4GiB"}):
        running = loaded(model, **options)
        for _ in range(2):
            assert all(map(torch.equal, [logits_of(running, tokens) for tokens in prompts], expected))


@pytest.mark.parametrize("damage", ["missing", "bytes", "shape", "nan"])
def test_a_router_that_does_not_fit_is_refused(model, tmp_path, damage):
    for name in ("experts", "experts.json"):
        (tmp_path / name).write_bytes((model.parent / name).read_bytes())
    file = router_file(tmp_path / "experts")
    tensors = load_file(router_file(model.parent / "experts"))
    if damage == "bytes":
        file.write_bytes(b"not a router")
    elif damage != "missing":
        tensors["1.weight"] = tensors["1.weight"][:, 1:].contiguous() if damage == "shape" else tensors["1.weight"] / 0
        save_file(tensors, file)
    message = {"missing": "no such file", "bytes": "not a file of safetensors"}.get(damage, "should be finite float32")
    with pytest.raises(ValueError, match=message):
        offload.load(model, pack=tmp_path / "experts", depth="router", cache_experts=2)


def test_a_budget_outside_of_the_levels_is_refused(model):
    inputs = offload.calibrate(
        *(model, model.parent / "book.txt", model.parent / "inputs"), tokens=512, length=64, needs_sensitivity=True
    )
    with pytest.raises(ValueError, match="must lie between"):
        offload.train_bit_router(model, model.parent / "experts", inputs, bits=1.0)
