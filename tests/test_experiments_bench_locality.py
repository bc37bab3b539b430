"""`bench locality` at toy size: it resumes, its figures are those of the saved traces, its intervals are right."""

import json
import math
from dataclasses import replace

import pytest

from experiments.bench.locality import bench, measures
from experiments.bench.locality.table import COLUMNS, claims_of, rows_of
from experiments.train.presets import preset
from experiments.variants.catalogue import model_overrides
from experiments.variants.locality import LOCALITY_VARIANTS, ORDINARY
from routing import RoutingTrace


def lru_hits(trace, slots):
    """Hits of an LRU of so many slots per layer, by a list."""
    hits = asked = 0
    for layer in range(trace.num_layers):
        held = []
        for token in trace.expert_TLK[:, layer].tolist():
            used = [expert for expert in token if expert >= 0]
            hits += sum(expert in held for expert in used)
            asked += len(used)
            for expert in used:
                held = [other for other in held if other != expert] + [expert]
            held = held[-slots:]
    return hits / asked


@pytest.mark.slow
def test_the_table_resumes_and_its_figures_are_those_of_the_saved_traces(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(25):
        (text / f"{number}.txt").write_text(" ".join(f"w{(number + i * i) % 31}" for i in range(400)))
    base = replace(preset("smoke"), model=preset("smoke").model | {"router": "olmoe"}, held_out_tokens=512)
    base = replace(base, steps=3, warmup_steps=1)
    for name, value in (("SOLVE_S", 0.2), ("DECODED_TOKENS", 6), ("TRACED_TOKENS", 512)):
        monkeypatch.setattr(measures, name, value)
    names = ["olmoe", "resident-4th", "resident-4th-next", "pregate-resident", "pool", "reuse-overlap"]
    given = {"seeds": 2, "data": str(text), "processes": 1}
    report = bench.compare_locality(names, base, tmp_path / "out", **given)
    assert [row["variant"] for row in report["variants"]] == names
    assert all(set(row["columns"]) == set(COLUMNS) and row["seeds"] == 2 for row in report["variants"])
    for run in report["runs"]:
        folder = tmp_path / "out" / "runs" / run["variant"] / f"seed_{run['seed']}"
        trace = RoutingTrace.load(folder / "routing.npz")
        for share, slots in (("12.5", 2), ("25", 2), ("50", 4)):
            assert run[f"lru_{share}"] == pytest.approx(lru_hits(trace, slots))
        if run["variant"].startswith("resident"):
            assert run["reads_25"] <= 1.0
    assert {(claim["constraint"], claim["loss"]) for claim in report["claims"]} == {
        (name, "reuse-overlap")
        for name in names
        if name in ("resident-4th", "resident-4th-next", "pregate-resident", "pool")
    }
    monkeypatch.setattr("experiments.compare.runs._train_and_measure", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(measures, "_trace", lambda *_: pytest.fail("measured again"))
    again = bench.compare_locality(names, base, tmp_path / "out", **given)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(report))


def result(variant, seed, bits, **columns):
    return (
        {"variant": variant, "seed": seed, "status": "finished"}
        | dict.fromkeys(COLUMNS, 0.5)
        | {
            "held_out_bits_per_byte": bits,
            **columns,
        }
    )


def test_intervals_and_claims_by_hand():
    results = [result("olmoe", seed, 2.0 + seed / 10) for seed in range(3)]
    results += [result("resident-4th", seed, 2.1 + seed / 10, lru_25=0.8) for seed in range(3)]
    results += [result("reuse-l2", seed, 2.3 + seed / 10 + (seed == 1) / 100, lru_25=0.6) for seed in range(3)]
    first, resident, by_loss = rows_of(results)
    # Student's t of 2 degrees of freedom at 97.5 % is 4.3027
    bits = first["columns"]["held_out_bits_per_byte"]
    assert bits["mean"] == pytest.approx(2.1)
    assert bits["high"] - bits["mean"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert resident["difference"]["mean"] == pytest.approx(0.1)
    assert by_loss["difference"]["verdict"] == "worse"
    (claim,) = claims_of(results)
    assert claim["difference"]["mean"] == pytest.approx(-0.2 - 0.01 / 3)
    assert claim["difference"]["verdict"] == "better"
    assert claim["lru_25"] == {"constraint": pytest.approx(0.8), "loss": pytest.approx(0.6)}


def test_there_are_enough_variants_of_both_kinds_and_all_can_be_built():
    assert len(LOCALITY_VARIANTS) >= 8
    assert len(ORDINARY) >= 6
    base = bench.base_config(bench.DEFAULT_TOKENS)
    tokens = base.steps * base.batch_size * base.accumulation * base.sequence_length
    assert tokens >= 4_000_000
    assert base.model["num_experts"] >= 32
    for name in LOCALITY_VARIANTS:
        assert model_overrides(name, base.model)["num_experts_per_tok"] == 2
