import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import SOLVERS, Cluster, Problem, solve
from placement.bounds.imbalance import cardinality_bound_L
from placement.checking.check import check_plan, doubled_copies


def brute_imbalance(weight_E, gpus):
    """Least fullest over mean GPU, by trying every way to deal the experts."""
    size = len(weight_E) // gpus

    def best(left, worst):
        if not left:
            return worst
        first, rest = left[0], left[1:]
        found = np.inf
        for others in itertools.combinations(rest, size - 1):
            load = weight_E[first] + sum(weight_E[o] for o in others)
            found = min(found, best([e for e in rest if e not in others], max(worst, load)))
        return found

    return best(list(range(len(weight_E))), 0.0) * gpus / weight_E.sum()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(6, 2), (6, 3), (4, 2), (8, 2)]),
    seed=st.integers(0, 10_000),
    skew=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_bound_is_below_and_ilp_equals_brute_force(shape, seed, skew):
    experts, gpus = shape
    load = np.random.default_rng(seed).lognormal(0, skew, (1, experts))
    best = brute_imbalance(load[0], gpus)
    assert cardinality_bound_L(load / load.sum(), gpus)[0] <= best * (1 + 1e-9)
    plan = solve(Problem.from_loads(load, Cluster.grid(1, gpus)), solver="ilp", time_limit_s=20)
    assert plan.certificate.objective == pytest.approx(best, rel=1e-5)
    assert plan.certificate.is_proven_optimal


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("moetuner", "exflow", "fill")])
@pytest.mark.parametrize("replicas", [0, 8])
def test_every_solver_gives_a_valid_plan_within_its_bound(solver, replicas):
    load = np.random.default_rng(1).lognormal(0, 1, (3, 16))
    load[1] = 0
    problem = Problem.from_loads(load, Cluster.grid(2, 4, model={"expert_groups": 4}), replicas=replicas)
    plan = solve(problem, solver=solver, time_limit_s=1)
    assert check_plan(plan, made_from=problem) == []
    assert plan.certificate.bound <= plan.certificate.objective
    assert plan.layer_ids == (0, 2)
    if solver in ("lpt", "search", "auto", "ilp"):
        assert doubled_copies(plan) == 0
        eplb_plan = solve(problem, solver="eplb-global")
        assert plan.certificate.objective <= eplb_plan.certificate.objective + 1e-9


def test_unknown_names_are_refused():
    problem = Problem.from_loads(np.ones((1, 8)), Cluster.grid(1, 2))
    with pytest.raises(ValueError, match="unknown solver 'magic'"):
        solve(problem, solver="magic")
    with pytest.raises(ValueError, match="unknown objective 'magic'"):
        solve(problem, objective="magic")
    with pytest.raises(ValueError, match="needs a routing trace"):
        solve(problem, objective="fanout")
