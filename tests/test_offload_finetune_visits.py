"""One pool of slots for all layers: what is read next, what stays, and that nothing is mixed up."""

from math import inf

import torch
from transformers import AutoModelForCausalLM

import offload
from offload.finetune.passing.opening import open_tuned
from offload.finetune.storage.sweeps import Sweeps
from tests.small_tuning import LENGTH, save_model


def test_a_round_trip_by_hand():
    sweeps = Sweeps(3, is_round_trip=True, crosses_steps=True)
    sweeps.visit(0, [1, 2])
    # nothing is known of the layers above; this one comes back at the end of the way down
    assert list(sweeps.ahead())[:2] == [(5, (0, 1)), (5, (0, 2))]
    sweeps.visit(1, [0])
    sweeps.visit(2, [3])
    assert list(sweeps.ahead())[:5] == [(1, (2, 3)), (2, (1, 0)), (3, (0, 1)), (3, (0, 2)), (4, (0, 1))]
    assert [sweeps.visits_until(key) for key in ((2, 3), (1, 0), (0, 2), (2, 0))] == [1, 2, 3, inf]
    sweeps.visit(2, [3])
    assert sweeps.visits_until((1, 0)) == 1
    assert sweeps.visits_until((2, 3)) == 5


def test_nothing_is_read_for_the_next_step_where_experts_change_before_it():
    sweeps = Sweeps(2, is_round_trip=True, crosses_steps=False)
    for layer in (0, 1, 1):
        sweeps.visit(layer, [layer])
    assert list(sweeps.ahead()) == [(1, (0, 0))]
    sweeps.visit(0, [0])
    assert list(sweeps.ahead()) == []
    assert sweeps.visits_until((0, 0)) == 1, "it stays all the same"


def test_one_way_begins_again_at_the_first_layer():
    sweeps = Sweeps(2, is_round_trip=False, crosses_steps=True)
    sweeps.visit(0, [4])
    sweeps.visit(1, [5])
    assert list(sweeps.ahead()) == [(1, (0, 4)), (2, (1, 5))]


def test_slots_hold_what_comes_back_first_and_every_expert_is_itself(tmp_path):
    save_model(tmp_path / "model", torch.float32, num_hidden_layers=3)
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.layers
    options = offload.TuneOptions(method="lora", steps=1, sequence_length=LENGTH)
    tuned = open_tuned(tmp_path / "model", options, cache_experts=4)
    visits = tuned.experts.visits
    for _ in range(3):
        for layer in (0, 1, 2, 2, 1, 0):
            seen = []
            for expert, weights in visits(layer, range(8)):
                assert torch.equal(weights["down_proj"], layers[layer].mlp.experts.down_proj[expert])
                seen.append(expert)
            assert sorted(seen) == list(range(8))
    traffic, size = visits.traffic, visits.forms[0].expert_bytes
    tuned.close()
    # 12 of 24 experts fit: no order of eviction saves more than 12 reads of each of the five sweeps after the first
    assert traffic.hits + traffic.misses == 3 * 48
    assert 5 * 6 <= traffic.hits <= 5 * 12
    assert traffic.bytes_read == traffic.misses * size
    assert traffic.bytes_in_vain == 0
