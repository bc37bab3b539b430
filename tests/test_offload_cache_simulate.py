"""Simulation on traces: agreement with reuse distances, shared against per-layer caches, bad input."""

import json

import numpy as np
import pytest

from experiments import cli as joined_cli
from offload.cache.simulate import gap_closed, simulate
from routing.traces import EMPTY, RoutingTrace, reuse_distance_TK


@pytest.fixture
def trace():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 3, 12)) + 2 * np.sin(np.arange(400) / 40)[:, None, None] * rng.normal(size=(3, 12))
    expert_TLK = np.argsort(-scores, axis=-1)[:, :, :2].astype(np.int16)
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(400, np.int32), metadata={"num_experts": 12})


@pytest.mark.parametrize("capacity", [2, 4, 7, 12])
def test_per_layer_lru_hits_what_reuse_distances_say(trace, capacity):
    result = simulate(trace, capacity, policies=["lru"])["lru"]
    for layer in range(trace.num_layers):
        distance = reuse_distance_TK(trace, layer)
        assert result.hits_L[layer] == ((distance >= 0) & (distance < capacity)).sum()


def test_a_shared_lru_falls_off_a_cliff_below_one_tokens_cycle(trace):
    assert simulate(trace, trace.num_layers - 1, per_layer=False, policies=["lru"])["lru"].hit_rate == 0
    assert simulate(trace, trace.num_layers * 12, per_layer=False, policies=["lru"])["lru"].hit_rate > 0.9


def test_belady_is_best_and_everything_hits_once_it_fits(trace):
    results = simulate(trace, 5)
    assert results["belady"].hit_rate == max(result.hit_rate for result in results.values())
    full = simulate(trace, 12, policies=["lru"])["lru"]
    assert full.accesses_L.sum() - full.hits_L.sum() == 3 * 12


def test_empty_slots_and_repeated_experts_are_not_accesses():
    expert_TLK = np.array([[[0, 0]], [[0, EMPTY]]], np.int16)
    result = simulate(RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(2, np.int32)), 1, policies=["lru"])["lru"]
    assert (result.hits_L.tolist(), result.accesses_L.tolist()) == ([1], [2])


def test_share_of_the_gap(trace):
    results = simulate(trace, 5)
    shares = gap_closed(results)
    assert (shares["lru"], shares["belady"]) == (0, 1)
    expected = results["lru"].hit_rate + shares["score"] * (results["belady"].hit_rate - results["lru"].hit_rate)
    assert results["score"].hit_rate == pytest.approx(expected)
    assert set(gap_closed(simulate(trace, 12)).values()) == {None}


def test_unknown_policy(trace):
    with pytest.raises(ValueError, match=r"unknown cache policy 'leanred' \(did you mean 'learned'\?\)"):
        simulate(trace, 4, policies=["leanred"])


def test_command_writes_the_promised_keys(trace, tmp_path, monkeypatch):
    trace.save(tmp_path / "t.npz")
    arguments = [
        "simulate",
        str(tmp_path / "t.npz"),
        "--cache-experts",
        "4",
        "--per-layer",
        "--rows",
        "100",
        "--policy",
        "score",
    ]
    monkeypatch.setattr("sys.argv", ["expertier", *arguments, "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as finished:
        joined_cli.main()
    assert not finished.value.code
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["policies"]["belady"]["gap_closed"] == 1
    assert report["policies"]["lru"]["hit_rate"] == pytest.approx(simulate(trace.rows(0, 100), 4)["lru"].hit_rate)
