"""Activations that are spilled to the disk come back as they were: gradients and results keep every bit."""

import dataclasses
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import offload
from moe import save_byte_tokenizer
from offload.finetune.run import read_log
from offload.finetune.storage.activation_plan import StepLoad, UnitCost, choose
from offload.finetune.storage.activations import LEAST_BYTES, Spilled, SpilledActivations
from offload.finetune.storage.float8 import GROUP, LARGEST, decode, encode
from offload.finetune.storage.visits import Traffic
from tests.small_tuning import HEADS, LENGTH, SIZES, save_examples, save_model


def save_shared(folder):
    """A family that adds what its shared expert gives to the experts' outputs in place."""
    torch.manual_seed(0)
    sizes = SIZES | HEADS | {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_byte_tokenizer(folder)


pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensors_come_back_in_their_own_order_and_are_written_once(tmp_path):
    weight, traffic = torch.randn(64, 128), Traffic()
    spilled = SpilledActivations(weight.nbytes, tmp_path, traffic, [weight])
    turned = torch.randn(128, 64).t()
    assert spilled._pack(weight) is weight
    assert spilled._pack(torch.zeros(LEAST_BYTES // 4 - 1)).nbytes < LEAST_BYTES
    first = spilled._pack(turned)
    assert first is turned, "there is room for it"
    assert spilled._pack(turned) is turned, "which takes no more room"
    turned = torch.randn(128, 64).t()
    kept = [spilled._pack(turned), spilled._pack(turned)]
    assert all(isinstance(one, Spilled) for one in kept)
    assert traffic.bytes_written == turned.nbytes
    for one in kept:
        found = spilled.unpack(one)
        assert found.stride() == turned.stride()
        assert torch.equal(found, turned)
    with_gaps = torch.randn(128, 128)[:, :100]
    assert spilled._pack(with_gaps) is with_gaps
    spilled.close()


def best_seconds(units, other_bytes, limit_bytes, load):
    """Of all choices that fit, by trying them."""
    found = []
    for choices in product(("kept", "spilled", "recomputed"), repeat=len(units)):
        left = {"kept": lambda unit: unit.nbytes, "spilled": lambda unit: 0, "recomputed": lambda unit: unit.held_bytes}
        held = sum(left[choice](unit) for unit, choice in zip(units, choices, strict=True))
        if other_bytes + held <= limit_bytes:
            found.append(load.with_choices(units, choices).seconds)
    return min(found)


@pytest.mark.parametrize("load", [StepLoad(10, 4, 2.0), StepLoad(4, 10, 2.0), StepLoad(5, 5, 0.5)])
@pytest.mark.parametrize("limit_bytes", [3, 9, 16, 25])
def test_choices_fit_and_are_as_fast_as_the_best_of_all_to_within_a_unit(load, limit_bytes):
    units, other_bytes = [UnitCost(nbytes=4, held_bytes=0.5, rerun_s=1.5)] * 6, 0
    choices = choose(units, other_bytes, limit_bytes, load)
    kept = {"kept": 4, "spilled": 0, "recomputed": 0.5}
    assert sum(kept[choice] for choice in choices) <= limit_bytes
    assert choices == sorted(choices, key=lambda choice: choice == "kept"), "the last layers stay"
    one = max(2 * 4 / load.disk_bytes_per_s, 1.5)
    best = best_seconds(units, other_bytes, limit_bytes, load)
    assert best <= load.with_choices(units, choices).seconds <= best + one


def test_transfers_hide_behind_products_and_products_behind_transfers():
    units = [UnitCost(nbytes=10, held_bytes=1, rerun_s=1)] * 4
    assert choose(units, 5, 45, StepLoad(1, 1, 1)) == ["kept"] * 4
    # the disk is idle for 100 s, each unit takes 20 s of it
    assert choose(units, 0, 0, StepLoad(0, 100, 1)) == ["spilled"] * 4
    assert choose(units, 0, 4, StepLoad(100, 0, 1)) == ["recomputed"] * 4
    assert set(choose(units, 0, 0, StepLoad(80, 97, 1))) == {"spilled", "recomputed"}
    # nothing is gained where what stays is as large
    assert choose([UnitCost(nbytes=1, held_bytes=1, rerun_s=0)], 0, 0, StepLoad(9, 0, 1)) == ["spilled"]


@pytest.fixture
def always_recomputes(monkeypatch):
    chosen = []

    def choose_all(units, *given):
        chosen.append(units)
        return [("recomputed", "spilled", "kept")[number % 3] for number in range(len(units))]

    monkeypatch.setattr("offload.finetune.storage.activations.choose", choose_all)
    return chosen


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_layers_that_are_computed_again_give_the_same_bits(family, always_recomputes, tmp_path):
    """Of six micro-batches in layers two are computed again, two spilled, two kept; experts are read no oftener."""
    torch.set_num_threads(1)
    if family == "qwen3_moe":
        save_model(tmp_path / "model", torch.float32, num_hidden_layers=3)
    else:
        save_shared(tmp_path / "model")
    save_examples(tmp_path / "data.jsonl")
    options = offload.TuneOptions(
        method="lora", steps=3, sequence_length=2 * LENGTH, batch_size=2, accumulation=2, learning_rate=1e-3, rank=2
    )
    found = []
    for limit in (None, 150_000):
        out, changed = tmp_path / f"limit{limit}", dataclasses.replace(options, activation_bytes=limit)
        offload.fine_tune(tmp_path / "model", tmp_path / "data.jsonl", out, changed, cache_experts=8)
        found.append((load_file(out / "adapter_model.safetensors"), read_log(out / "metrics.jsonl")))
    assert all(torch.equal(value, found[1][0][key]) for key, value in found[0][0].items())
    (units,) = always_recomputes
    assert len(units) == 6
    assert all(unit.nbytes > unit.held_bytes > 0 and unit.rerun_s > 0 for unit in units)
    first, second = found[1][1][:2]
    assert (first["activation_share_recomputed"], second["activation_share_recomputed"]) == (0, 2 / 6)
    assert max(row["activation_bytes_kept"] for row in found[1][1]) <= 150_000
    assert [row["hit_rate"] for row in found[0][1]] == [row["hit_rate"] for row in found[1][1]]


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_with_spilled_activations_keeps_every_bit(method, tmp_path):
    torch.set_num_threads(1)
    save_model(tmp_path / "model", torch.float32)
    save_examples(tmp_path / "data.jsonl")
    options = offload.TuneOptions(
        method=method, steps=2, sequence_length=2 * LENGTH, batch_size=2, accumulation=2, learning_rate=1e-3, rank=2
    )
    found = {}
    for limit in (None, 100_000, 0):
        out = tmp_path / f"limit{limit}"
        changed = dataclasses.replace(options, activation_bytes=limit)
        offload.fine_tune(tmp_path / "model", tmp_path / "data.jsonl", out, changed, cache_experts=8)
        weights = {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}
        found[limit] = weights, read_log(out / "metrics.jsonl")[1]
    for limit in (100_000, 0):
        assert all(torch.equal(value, found[limit][0][key]) for key, value in found[None][0].items())
    written = [row["bytes_written"] for _, row in found.values()]
    assert written[0] < written[1] < written[2]


def test_float8_by_hand():
    values = torch.zeros(2 * GROUP + 3)
    values[:4] = torch.tensor([LARGEST, -1.0, 1.0625, 2.0**-9])
    values[-1] = -3.0e-5
    codes, scales = encode(values)
    assert codes.dtype == torch.uint8
    assert codes.shape == values.shape
    assert scales[0] == 1
    found = decode(codes, scales, torch.float32)
    # three bits behind the point: 1.0625 lies between 1 and 1.125, and goes to the even one
    assert found[:4].tolist() == [LARGEST, -1.0, 1.0, 2.0**-9]
    assert found[4:-1].abs().max() == 0
    assert found[-1] == pytest.approx(-3.0e-5)
    draws = torch.randn(1000, dtype=torch.bfloat16)
    assert (decode(*encode(draws), torch.float32) - draws).abs().max() <= draws.abs().max() / 16


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_activations_in_8_bits_take_a_fraction_and_say_how_far_gradients_are_off(method, tmp_path):
    torch.set_num_threads(1)
    save_model(tmp_path / "model", torch.float32)
    save_examples(tmp_path / "data.jsonl")
    options = offload.TuneOptions(
        method=method, steps=2, sequence_length=2 * LENGTH, batch_size=2, learning_rate=1e-3, rank=2
    )
    rows = {}
    for name, changes in (("exact", {"activation_bytes": 1 << 30}), ("coded", {"activation_bits": 8})):
        changed = dataclasses.replace(options, **changes)
        offload.fine_tune(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / name, changed, cache_experts=8)
        rows[name] = read_log(tmp_path / name / "metrics.jsonl")
    exact, coded = rows["exact"], rows["coded"]
    assert coded[0]["loss"] == exact[0]["loss"], "the forward pass is exact"
    assert coded[1]["loss"] == pytest.approx(exact[1]["loss"], rel=1e-3)
    assert 1e-4 < coded[0]["gradient_error"] < 0.1
    assert "gradient_error" not in coded[1]
    assert "gradient_error" not in exact[0]
    assert coded[1]["activation_bytes_kept"] < 0.5 * exact[1]["activation_bytes_kept"]


def test_bits_of_activations_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="activation_bits must be 8"):
        offload.TuneOptions(method="lora", steps=1, activation_bits=4)
    with pytest.raises(ValueError, match="are of methods with a backward pass"):
        offload.TuneOptions(method="zo", steps=1, activation_bits=8)
