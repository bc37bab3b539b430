import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import SOLVERS, Cluster, Problem, score, solve
from placement.checking.check import check_plan, doubled_copies
from placement.data.bundles import unique_sets
from placement.data.generators import generate_trace
from placement.ilp.exflow import solve_exflow
from placement.search.hops.annealing import ChainAnnealing, ChainTask
from placement.search.tabu import LayerTask, SearchState, tabu_search


def make_task(seed, items=12, gpus=4, has_linear=False):
    random = np.random.default_rng(seed)
    sets = np.argsort(random.gumbel(size=(80, items)), axis=1)[:, :3]
    return LayerTask(
        bundles=unique_sets(sets),
        weight_WX=random.dirichlet(np.ones(items), 2),
        expert_X=np.arange(items),
        speed_G=np.array([1.0, 1.0, 0.8, 1.2])[:gpus],
        node_G=np.array([0, 0, 1, 1])[:gpus],
        fan=0.7,
        node=1.3,
        level=0.5,
        linear_XG=random.normal(size=(items, gpus)) if has_linear else None,
    )


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), has_linear=st.booleans())
def test_every_swap_change_is_exact_also_after_swaps(seed, has_linear):
    task = make_task(seed, has_linear=has_linear)
    random = np.random.default_rng(seed)
    state = SearchState(task, random.permutation(np.arange(12) // 3))
    for _ in range(4):
        change_XX, cost = state.change_XX(), state.cost
        for x, y in itertools.combinations(range(12), 2):
            if state.gpu_X[x] == state.gpu_X[y]:
                assert np.isinf(change_XX[x, y])
                continue
            swapped = state.gpu_X.copy()
            swapped[[x, y]] = swapped[[y, x]]
            assert cost + change_XX[x, y] == pytest.approx(SearchState(task, swapped).cost, abs=1e-5)
        x, y = random.choice(12, 2, replace=False)
        state.swap(int(x), int(y))


def test_tabu_finds_the_optimum_of_a_small_layer():
    task = make_task(3, items=6, gpus=3)
    starts = [np.random.default_rng(seed).permutation(np.arange(6) // 2) for seed in range(6)]
    found = [tabu_search(task, start, rounds=80, seed=1)[1] for start in starts]
    everything = {tuple(p) for p in itertools.permutations([0, 0, 1, 1, 2, 2])}
    best = min(SearchState(task, np.array(p)).cost for p in everything)
    assert min(found) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("objective", "nodes"), [("fanout+balance", 1), ("fanout", 2), ("hops+balance", 1)])
@pytest.mark.parametrize("replicas", [0, 8])
def test_search_beats_contiguous_on_its_objective(objective, nodes, replicas):
    trace = generate_trace(tokens=600, layers=3, experts=16, top_k=3, blocks=4, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(nodes, 8 // nodes), replicas=replicas)
    plan = solve(problem, objective=objective, solver="search", time_limit_s=0.5, processes=1)
    base = solve(problem, objective=objective, solver="contiguous")
    assert check_plan(plan, made_from=problem) == []
    assert doubled_copies(plan) == 0
    assert plan.certificate.objective < base.certificate.objective
    assert plan.certificate.bound <= plan.certificate.objective


def test_large_layers_go_node_by_node():
    trace = generate_trace(tokens=600, layers=1, experts=96, top_k=4, blocks=8, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(4, 4))
    plan = solve(problem, objective="fanout+balance", solver="search", time_limit_s=1.0, processes=1)
    base = solve(problem, objective="fanout+balance", solver="contiguous")
    assert plan.certificate.objective < base.certificate.objective


def test_exact_fanout_equals_enumeration():
    trace = generate_trace(tokens=60, layers=1, experts=6, top_k=2, blocks=3, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(1, 3))
    plan = solve(problem, objective="fanout", solver="ilp", time_limit_s=20)
    sets = trace.expert_TLK[:, 0]
    best = min(
        np.mean([len({order.index(int(e)) // 2 for e in row}) for row in sets])
        for order in itertools.permutations(range(6))
    )
    assert plan.certificate.objective == pytest.approx(best, abs=1e-6)
    assert plan.certificate.is_proven_optimal


def test_exflow_equals_brute_force_on_two_layers():
    pair = np.random.default_rng(0).integers(0, 9, (1, 4, 4)).astype(float)
    found = solve_exflow(pair, [np.arange(4)] * 2, 2, time_limit_s=20)
    splits = [np.array(p) for p in set(itertools.permutations([0, 0, 1, 1]))]
    best = min((pair[0] * (a[:, None] != b)).sum() for a in splits for b in splits)
    assert (pair[0] * (found[0][:, None] != found[1])).sum() == best


@pytest.mark.parametrize("solver", ["moetuner", "exflow"])
def test_published_programmes_give_valid_plans(solver):
    trace = generate_trace(tokens=300, layers=3, experts=8, top_k=2, blocks=4, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(2, 2))
    plan = solve(problem, objective="hops", solver=solver, time_limit_s=2.5)
    assert check_plan(plan, made_from=problem) == []
    if solver == "exflow":
        assert plan.certificate.objective <= solve(problem, objective="hops", solver="contiguous").certificate.objective
    with pytest.raises(ValueError, match="no replicas"):
        solve(Problem.from_trace(trace, Cluster.grid(2, 2), replicas=4), solver=solver)
    assert solver in SOLVERS


def test_annealing_keeps_groups_equal_and_finds_an_obvious_chain():
    pair = np.zeros((3, 8, 8))
    for layer in range(3):
        pair[layer, np.arange(8), np.roll(np.arange(8), layer + 1)] = 1 / 8
    start = np.stack([np.random.default_rng(layer).permutation(np.arange(8) // 2) for layer in range(4)])
    everyone = np.tile(np.arange(8), (4, 1))
    task = ChainTask(
        pair_LXX=pair,
        saved_GG=np.eye(4),
        weight_LWX=np.full((4, 1, 8), 1 / 8),
        speed_G=np.ones(4),
        expert_LX=everyone,
        price=0.0,
    )
    gpu_LX = ChainAnnealing(task, start, 0).run(2000, float("inf"))
    assert all(np.bincount(row).tolist() == [2, 2, 2, 2] for row in gpu_LX)
    stay = sum(pair[layer][gpu_LX[layer][:, None] == gpu_LX[layer + 1]].sum() for layer in range(3))
    assert stay == pytest.approx(3)


def test_planning_on_several_workloads_is_judged_by_the_worst():
    random = np.random.default_rng(0)
    loads = {name: random.lognormal(0, 1, (4, 32)) for name in "abc"}
    problem = Problem.from_loads(loads, Cluster.grid(1, 8), replicas=8)
    plan = solve(problem, time_limit_s=0.5)
    single = solve(Problem.from_loads({"a": loads["a"]}, Cluster.grid(1, 8), replicas=8), time_limit_s=0.5)
    assert score(problem, plan).balancedness > score(problem, single).balancedness
