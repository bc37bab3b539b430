"""SolveRequest: hold-out, churn, renumbering and validation without a command line; comparisons that know no more."""

from dataclasses import replace

import numpy as np
import pytest

from placement import Cluster, Problem, generate_trace, score, solve
from placement.checking.check import check_plan
from placement.contract.notes import cluster_notes
from placement.objectives.churn import churn
from placement.pages.names import short_names
from placement.solving.certify import validate_plan
from placement.solving.comparison import NO_DATA, THIS_DATA, compare_with_baselines, planning_problem
from placement.solving.elastic import match_gpus, migrate_checked
from placement.solving.request import HELD_OUT, SolveRequest, run_request, split_by_sequence


@pytest.fixture
def problem():
    trace = generate_trace(tokens=400, layers=2, experts=16, top_k=2, blocks=4, tokens_per_sequence=20)
    return Problem.from_trace(trace, Cluster.grid(2, 4, model={"expert_bytes": 1e9}), replicas=8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "serch"}, "unknown solver 'serch' .did you mean 'search'"),
        ({"robustness": "men"}, "unknown robustness 'men' .did you mean 'mean'.*; there are cvar, max, mean"),
        ({"objective": "balanced"}, "unknown objective 'balanced' .did you mean 'balance'"),
        ({"churn_weight": 1.0}, "--churn-weight needs --current"),
    ],
)
def test_a_request_is_refused_when_it_is_made(problem, settings, words):
    with pytest.raises(ValueError, match=words):
        SolveRequest(problem=problem, **settings)


def test_holding_out_judges_on_whole_sequences_that_were_not_planned_on(problem):
    result = run_request(SolveRequest(problem=problem, solver="lpt", holdout=0.3, seed=2))
    kept, aside = split_by_sequence(problem, 0.3, 2)
    sequences = [set(np.unique(one.scenarios[0].trace.sequence_T)) for one in (kept, aside)]
    assert not sequences[0] & sequences[1]
    assert len(sequences[1]) == round(0.3 * len(sequences[0] | sequences[1]))
    assert (kept.num_slots, aside.num_slots) == (problem.num_slots, problem.num_slots)
    assert check_plan(result.plan, made_from=kept) == []
    found = result.plan.certificate.out_of_sample[HELD_OUT]
    assert found["balancedness"] == pytest.approx(score(aside, result.plan, "balance").balancedness)
    assert result.plan.certificate.in_sample["balancedness"] > found["balancedness"]


@pytest.mark.parametrize(
    ("share", "words"), [(0.001, "leaves nothing"), (0.999, "leaves nothing"), (1.5, "leaves nothing")]
)
def test_shares_that_leave_nothing_are_refused(problem, share, words):
    with pytest.raises(ValueError, match=words):
        split_by_sequence(problem, share, 0)


def test_loads_cannot_be_split():
    with pytest.raises(ValueError, match="with --loads use --validate"):
        split_by_sequence(Problem.from_loads(np.ones((1, 8)), Cluster.grid(1, 2)), 0.5, 0)


def test_a_running_plan_renumbers_gpus_and_counts_what_moves(problem):
    running = solve(problem, solver="random", seed=3)
    again = replace(problem, current=running)
    result = run_request(SolveRequest(problem=again, solver="eplb-global"))
    plain = solve(problem, solver="eplb-global")
    assert result.churn.moved_copies == churn(running, match_gpus(running, plain)).moved_copies
    assert result.churn.moved_copies <= churn(running, plain).moved_copies
    assert result.churn.moved_bytes == result.churn.moved_copies * 1e9
    assert result.to_json()["churn"]["moved_copies"] == result.churn.moved_copies
    stays = run_request(SolveRequest(problem=again, churn_weight=1e6, time_limit_s=1))
    assert stays.churn.moved_copies == 0
    assert stays.plan.objective_name == "balance+1e+06*churn"


def test_validation_is_by_name(problem):
    other = replace(problem, scenarios=(replace(problem.scenarios[0], load_LE=problem.scenarios[0].load_LE[:, ::-1]),))
    result = run_request(SolveRequest(problem=problem, solver="lpt", held={"turned round": other}))
    assert list(result.plan.certificate.out_of_sample) == ["turned round"]
    assert result.churn is None
    report = result.to_json()
    assert list(report)[:7] == ["objective", "bound", "gap", "balancedness", "gpu_fanout", "node_fanout", "seconds"]
    assert validate_plan(result.plan, {}) is result.plan


def test_migration_is_carried_out_on_paper(problem):
    first, second = (solve(problem, solver="random", seed=seed) for seed in (0, 1))
    found = migrate_checked(first, second)
    value = found.to_json()
    assert value["moved_bytes"] == 1e9 * sum(step["kind"] == "transfer" for step in value["steps"])
    assert set(value) == {"moved_bytes", "node_crossing_bytes", "peak_extra_bytes", "steps"}


# Baselines know what the plan knew.


def two_workloads(layers=2, experts=32):
    random = np.random.default_rng(0)
    usual = random.lognormal(0, 1, (layers, experts))
    return {"decode": usual, "prefill": usual * random.lognormal(0, 0.8, (layers, experts))}


def test_eplb_beside_a_plan_is_made_from_the_plans_data():
    loads = two_workloads()
    decode, prefill = (Problem.from_loads({n: loads[n]}, Cluster.grid(1, 8), replicas=8) for n in loads)
    plan = solve(decode, time_limit_s=2)
    rows = compare_with_baselines(plan, prefill)
    assert [(row.name, row.planned_on) for row in rows] == [
        ("contiguous", NO_DATA),
        ("EPLB", "decode"),
        ("EPLB, knowing this data", THIS_DATA),
        ("this plan", "decode"),
    ]
    by_name = {row.name: row.score.balancedness for row in rows}
    fair = score(prefill, solve(decode, solver="eplb-global"), "balance").balancedness
    assert by_name["EPLB"] == pytest.approx(fair, abs=1e-3)
    assert by_name["EPLB, knowing this data"] > by_name["EPLB"] + 0.05
    assert by_name["EPLB, knowing this data"] > by_name["this plan"]


def test_on_its_own_data_there_is_one_eplb():
    loads = two_workloads()
    decode = Problem.from_loads({"decode": loads["decode"]}, Cluster.grid(1, 8), replicas=8)
    rows = compare_with_baselines(solve(decode, time_limit_s=2), decode)
    assert [row.name for row in rows] == ["contiguous", "EPLB", "this plan"]
    assert rows[2].score.balancedness > rows[1].score.balancedness


@pytest.mark.parametrize("metadata", [{}, {"load": [[1.0]]}, {"load": "much"}, {"load": [[-1.0] * 32] * 2}])
def test_a_plan_without_its_loads_has_only_the_knowing_eplb(metadata):
    loads = two_workloads()
    decode = Problem.from_loads({"decode": loads["decode"]}, Cluster.grid(1, 8), replicas=8)
    plan = replace(solve(decode, solver="lpt"), metadata=metadata)
    assert planning_problem(plan, decode) is None
    rows = compare_with_baselines(plan, decode)
    assert [row.name for row in rows] == ["contiguous", "EPLB, knowing this data", "this plan"]
    assert rows[-1].planned_on == "its planning data"


# What the reader is told.


def spec(**changes):
    value = {
        "gpu_types": {"h": {"memory": "80GiB", "hbm": "3.35TB/s"}, "a": {"memory": "80GiB", "hbm": "2TB/s"}},
        "node_types": {"h": {"gpus": {"type": "h", "count": 2}}, "a": {"gpus": {"type": "a", "count": 2}}},
        "nodes": [{"type": "h"}, {"type": "a"}],
        "model": {"hidden": 64, "moe_intermediate": 32},
    }
    return Cluster.from_mapping(value | changes)


def test_gpu_types_that_differ_are_told_of_unless_speeds_say_so():
    assert len(notes := cluster_notes(spec())) == 1
    assert notes[0].startswith("GPU types differ, speed is 1 for all")
    assert cluster_notes(spec(nodes=[{"type": "h"}, {"type": "a", "speed": 0.6}])) == []


def test_unknown_sizes_are_told_of():
    assert any("memory not checked; give model.expert_bytes" in note for note in cluster_notes(spec(model={})))
    assert any(
        "memory not checked; give gpu_types" in note
        for note in cluster_notes(Cluster.grid(1, 2, model={"expert_bytes": 1e6}))
    )


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/a/b/decode.json", "/a/b/prefill.json"], ["decode.json", "prefill.json"]),
        (["/a/monday/x.json", "/a/sunday/x.json"], ["monday/x.json", "sunday/x.json"]),
        (["x.json", "/x.json", "y"], ["x.json", "//x.json", "y"]),
        (["held-out sequences", "loads"], ["held-out sequences", "loads"]),
        ([], []),
    ],
)
def test_names_instead_of_paths(names, short):
    assert list(short_names(names).values()) == short
    assert len(set(short)) == len(names)
