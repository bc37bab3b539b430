"""Activations that are spilled to the disk come back as they were: gradients and results keep every bit."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import offload
from offload.finetune.run import read_log
from offload.finetune.storage.activations import LEAST_BYTES, Spilled, SpilledActivations
from offload.finetune.storage.visits import Traffic
from tests.small_tuning import LENGTH, save_examples, save_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensors_come_back_in_their_own_order_and_are_written_once(tmp_path):
    weight, traffic = torch.randn(64, 128), Traffic()
    spilled = SpilledActivations(weight.nbytes, tmp_path, traffic, [weight])
    turned = torch.randn(128, 64).t()
    assert spilled._pack(weight) is weight
    assert spilled._pack(torch.zeros(LEAST_BYTES // 4 - 1)).nbytes < LEAST_BYTES
    first = spilled._pack(turned)
    assert first is turned, "there is room for it"
    kept = [spilled._pack(turned), spilled._pack(turned)]
    assert all(isinstance(one, Spilled) for one in kept)
    assert traffic.bytes_written == turned.nbytes
    for one in kept:
        found = spilled._unpack(one)
        assert found.stride() == turned.stride()
        assert torch.equal(found, turned)
    with_gaps = torch.randn(128, 128)[:, :100]
    assert spilled._pack(with_gaps) is with_gaps
    spilled.close()


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
