"""All parameters from the disk: bit-equal to dense AdamW on a resident model, at every number of slots."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from experiments.evidence.resident import load_resident
from offload.finetune.examples import NO_LOSS
from offload.finetune.methods import all_parameters
from offload.finetune.passing import opening
from offload.finetune.run import read_log
from offload.finetune.storage.byte_moments import BLOCK, MEAN, SQUARE
from tests.small_tuning import LENGTH, rows_of, save_models

OPTIONS = offload.TuneOptions(
    method="full",
    steps=6,
    sequence_length=LENGTH,
    batch_size=1,
    accumulation=2,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.1,
    clip_norm=0.5,
    checkpoint_every=4,
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("full"), "float32", "bfloat16", num_experts=16)


def tune(folder, name, options=OPTIONS, model="float32", **changes):
    offload.fine_tune(folder / model, folder / "data.jsonl", folder / name, options, **changes)
    return AutoModelForCausalLM.from_pretrained(folder / name).state_dict()


def resident(folder, options):
    """Dense AdamW on whole tensors of a model in memory, by torch alone; its weights and losses."""
    model, rows = (
        load_resident(folder / "float32"),
        rows_of(folder / "float32", folder / "data.jsonl"),
    )
    groups = [
        {"params": [value for value in model.parameters() if value.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [value for value in model.parameters() if value.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), fused=True)
    losses, untouched = [], 0
    for number in range(options.steps):
        batches = [
            rows.batch(number, micro, options.accumulation, options.batch_size, options.seed) for micro in (0, 1)
        ]
        num_learnt = sum(int((labels[:, 1:] != NO_LOSS).sum()) for _, labels in batches)
        losses.append(0.0)
        for ids, labels in batches:
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_learnt
            loss.backward()
            losses[-1] += loss.item()
        norm = norm_of(model)
        for value in model.parameters():
            value.grad.mul_(min(1.0, options.clip_norm / (norm + 1e-6)))
        touched = model.model.layers[0].mlp.experts.down_proj.grad.abs().amax((1, 2)) > 0
        untouched += int((~touched).sum())
        for group in optimizer.param_groups:
            group["lr"] = options.rate_at(number + 1)
        optimizer.step()
        optimizer.zero_grad()
    assert untouched
    return model.state_dict(), losses


def norm_of(model):
    """Squares summed in float64: those outside experts by tensor, those of experts by expert."""
    named = {name: value.grad for name, value in model.named_parameters()}
    square = sum(grad.double().square().sum().item() for name, grad in named.items() if ".experts." not in name)
    experts = 0.0
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        for down, up in zip(named[f"{name}.down_proj"], named[f"{name}.gate_up_proj"], strict=True):
            experts += torch.cat([down.reshape(-1), up.reshape(-1)]).double().square().sum().item()
    return (square + experts) ** 0.5


def test_bit_equal_to_dense_adamw_on_the_resident_model(folder):
    expected, losses = resident(folder, OPTIONS)
    for slots in (1, 5):
        found = tune(folder, f"slots{slots}", cache_experts=slots)
        assert [row["loss"] for row in read_log(folder / f"slots{slots}" / "metrics.jsonl")] == losses
        for name, value in expected.items():
            assert torch.equal(found[name], value), (slots, name)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_continues_bit_by_bit_after_its_last_commit(folder, dtype):
    whole = tune(folder, f"whole_{dtype}", model=dtype, cache_experts=3)

    def kill(row):
        if row["step"] == 6:
            raise SystemError

    name = f"killed_{dtype}"
    with pytest.raises(SystemError):
        tune(folder, name, model=dtype, cache_experts=3, advance=kill)
    assert [path.name for path in (folder / name / "checkpoints").iterdir()] == ["step_00000004"]
    found = tune(folder, name, model=dtype, cache_experts=16, resume=True)
    assert all(torch.equal(value, found[key]) for key, value in whole.items())


@pytest.mark.slow
def test_gradients_that_do_not_fit_in_memory_change_nothing(folder, monkeypatch):
    options = dataclasses.replace(OPTIONS, steps=2)
    expected = tune(folder, "kept", options, cache_experts=2)
    monkeypatch.setattr(all_parameters, "GRADIENT_BYTES", 5 * 4 * 3 * 64 * 64)
    found = tune(folder, "spilled", options, cache_experts=2)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "zo"])
def test_reading_past_the_page_cache_changes_nothing(folder, method, monkeypatch):
    options = dataclasses.replace(OPTIONS, method=method, steps=3)
    expected = tune(folder, f"cached_{method}", options, model="bfloat16", cache_experts=2)
    monkeypatch.setattr(opening, "wants_direct", lambda *given: True)
    found = tune(folder, f"direct_{method}", options, model="bfloat16", cache_experts=2)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_traffic_does_not_grow_with_accumulation(folder):
    moved = []
    for accumulation in (1, 4):
        options = dataclasses.replace(OPTIONS, steps=1, accumulation=accumulation, batch_size=4 // accumulation)
        tune(folder, f"accumulated{accumulation}", options, cache_experts=1)
        (row,) = read_log(folder / f"accumulated{accumulation}" / "metrics.jsonl")
        moved.append((row["bytes_read"], row["bytes_written"], row["load"]))
    assert moved[0] == moved[1]


def test_a_damaged_record_is_named(folder):
    tune(folder, "damaged", dataclasses.replace(OPTIONS, steps=1), cache_experts=2)
    file = folder / "damaged" / "experts" / "layer_000.bin"
    data = bytearray(file.read_bytes())
    for start in range(0, len(data), 4096):
        data[start] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match=r"layer_000.bin: expert \d+ has checksum"):
        tune(folder, "damaged", dataclasses.replace(OPTIONS, steps=2), cache_experts=2, resume=True)


def test_moments_in_bytes_by_hand_and_their_error():
    x = torch.zeros(BLOCK + 3)
    x[:4] = torch.tensor([4.0, -1.0, 1e-9, 0.0])
    code, scale = MEAN.encode(x)
    # the root of 1/4 is half of 127, rounded up; one in a billion of the largest is 0
    assert code[:4].view(torch.int8).tolist() == [127, -64, 0, 0]
    assert scale.tolist() == [4.0, 0.0]
    assert MEAN.decode(code, scale)[1].item() == pytest.approx(-4 * (64 / 127) ** 2)
    code, scale = SQUARE.encode(x.abs())
    # the fourth root of 1/4 is 180.3 of 255; what is not 0 stays above it
    assert code[:4].tolist() == [255, 180, 1, 0]
    moments = torch.randn(10_000)
    errors = [
        ((code.decode(*code.encode(values)) - values).norm() / values.norm()).item()
        for code, values in ((MEAN, moments), (SQUARE, moments.square()))
    ]
    assert 0.001 < errors[0] < 0.008
    assert 0.001 < errors[1] < 0.010


@pytest.mark.slow
def test_moments_in_bytes_are_near_float32_ones_and_equal_at_every_number_of_slots(folder):
    eight = dataclasses.replace(OPTIONS, state_bits=8)
    expected = tune(folder, "bits32", cache_experts=4)
    found = tune(folder, "bits8", eight, cache_experts=4)
    tune(folder, "bits8_again", dataclasses.replace(eight, steps=4), cache_experts=1)
    again = tune(folder, "bits8_again", eight, cache_experts=16, resume=True)
    assert all(torch.equal(value, again[key]) for key, value in found.items())
    begun = AutoModelForCausalLM.from_pretrained(folder / "float32").state_dict()
    experts = [key for key in begun if ".experts." in key]
    change = sum((expected[key] - begun[key]).double().square().sum() for key in experts) ** 0.5
    error = sum((found[key] - expected[key]).double().square().sum() for key in experts) ** 0.5
    assert 0 < error < 0.02 * change, error / change
    layer = [(folder / name / "experts" / "layer_000.bin").stat().st_size for name in ("bits8", "bits32")]
    # 4 + 1 + 1 bytes and scales against 4 + 4 + 4, in blocks of the disk
    assert 36 * layer[0] == 19 * layer[1]
