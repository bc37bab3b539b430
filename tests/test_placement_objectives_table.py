"""Every row of OBJECTIVES: its value by plain loops, its bound by trying every plan, its weights by their meaning."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import OBJECTIVES, Cluster, Plan, Problem, evaluate, generate_trace, solve, weighted
from placement.bounds.choice import BOUNDS, objective_bound
from placement.contract.problem import Scenario
from placement.objectives import Objective, PartWeights, evaluate_L, find_objective, join_scenarios
from placement.objectives.latency import layer_times

MODEL = {"hidden": 256, "moe_intermediate": 64, "top_k": 2, "expert_bytes": 5e8}
NO_TRACE = ("balance", "activated", "imbalance-price", "latency", "churn")


def cluster_of(nodes, gpus, speeds=None, **ep):
    cluster = Cluster.grid(nodes, gpus, model=MODEL, **ep)
    return cluster if speeds is None else replace(cluster, speed_G=np.array(speeds))


def traced(cluster, *, replicas=0, experts=8, tokens=40, layers=2, seed=0, scenarios=1):
    traces = {
        f"data {index}": generate_trace(
            tokens=tokens, layers=layers, experts=experts, top_k=2, blocks=2, tokens_per_sequence=10, seed=seed + index
        )
        for index in range(scenarios)
    }
    problem = Problem.from_trace(traces, cluster, replicas=replicas)
    return replace(problem, current=solve(problem, solver="random", seed=seed + 9))


CASES = {
    "one node": lambda: traced(cluster_of(1, 4)),
    "two nodes": lambda: traced(cluster_of(2, 2)),
    "copies": lambda: traced(cluster_of(2, 2), replicas=4),
    "uneven speeds": lambda: traced(cluster_of(1, 4, [1.0, 0.5, 2.0, 1.0]), replicas=4),
    "three scenarios": lambda: traced(cluster_of(1, 2), scenarios=3),
    "low latency mode": lambda: traced(cluster_of(2, 2, mode="ll", tokens_per_gpu=16), replicas=4),
    "one GPU": lambda: traced(cluster_of(1, 1)),
}


# What each objective means, layer by layer, without NumPy and without the project's code.


def holders(plan, layer):
    """GPU of every copy of every expert."""
    row = plan.physical_to_logical_LP[layer].tolist()
    per_gpu = len(row) // plan.cluster.num_gpus
    return {e: [s // per_gpu for s, one in enumerate(row) if one == e] for e in range(plan.num_experts)}


def loads_of(plan, scenario, layer):
    gpus = holders(plan, layer)
    total = [0.0] * plan.cluster.num_gpus
    for expert, load in enumerate(scenario.load_LE[layer].tolist()):
        for gpu in gpus[expert]:
            total[gpu] += load / len(gpus[expert])
    return total


def balance(plan, scenario, layer, problem):
    load, speed = loads_of(plan, scenario, layer), plan.cluster.speed_G.tolist()
    return max(one / s for one, s in zip(load, speed, strict=True)) / (sum(load) / sum(speed))


def batches(plan, scenario, layer, problem):
    """Worst tenth of the batches of consecutive tokens, copies sharing evenly; eight batches in a short trace."""
    tokens = scenario.trace.expert_TLK[:, layer].tolist()
    size, values = min(4096, len(tokens) // 8), []
    for start in range(0, len(tokens) // size * size, size):
        load = [0.0] * problem.num_experts
        for expert in itertools.chain(*tokens[start : start + size]):
            load[expert] += 1
        rows, gpu_load = holders(plan, layer), [0.0] * problem.num_gpus
        for expert, places in rows.items():
            for gpu in places:
                gpu_load[gpu] += load[expert] / len(places)
        speed = problem.cluster.speed_G.tolist()
        mean = sum(gpu_load) / sum(speed)
        values.append(max(one / s for one, s in zip(gpu_load, speed, strict=True)) / mean)
    assert problem.cluster.ep.dispatch == plan.dispatch
    worst = sorted(values)[-max(1, round(len(values) / 10)) :]
    return sum(worst) / len(worst)


def activated(plan, scenario, layer, problem):
    routes = problem.cluster.ep.tokens_per_gpu * problem.num_gpus * 2
    gpus, loads = holders(plan, layer), scenario.load_LE[layer].tolist()
    touched = [0.0] * problem.num_gpus
    for expert, load in enumerate(loads):
        share = load / sum(loads) / len(gpus[expert])
        for gpu in gpus[expert]:
            touched[gpu] += 1 - (1 - share) ** routes
    return max(touched)


def distinct(plan, scenario, layer, part_of):
    """Mean distinct parts per token, over every way in which copies can be chosen."""
    gpus, per_token = holders(plan, layer), []
    for experts in scenario.trace.expert_TLK[:, layer].tolist():
        choices = list(itertools.product(*(gpus[e] for e in experts)))
        per_token.append(sum(len({part_of[g] for g in choice}) for choice in choices) / len(choices))
    return sum(per_token) / len(per_token)


def gpu_fanout(plan, scenario, layer, problem):
    return distinct(plan, scenario, layer, list(range(problem.num_gpus)))


def node_fanout(plan, scenario, layer, problem):
    return distinct(plan, scenario, layer, plan.cluster.node_G.tolist())


def fanout(plan, scenario, layer, problem):
    if problem.cluster.num_nodes == 1:
        return gpu_fanout(plan, scenario, layer, problem)
    cheap = 50e9 / 450e9  # one NIC of 50 GB/s and NVLink of 450 GB/s per GPU are the defaults
    return cheap * gpu_fanout(plan, scenario, layer, problem) + node_fanout(plan, scenario, layer, problem)


def imbalance_price(plan, scenario, layer, problem):
    return (1.8 if problem.cluster.num_nodes == 1 else 1.0) * balance(plan, scenario, layer, problem)


def hops(plan, scenario, layer, problem):
    """Moves of the first choice into a layer; the mean over layers is that over the L - 1 transitions."""
    if layer == 0:
        return 0.0
    before, here, moved = holders(plan, layer - 1), holders(plan, layer), []
    weight_TLK = scenario.trace.weight_TLK.tolist()
    for token, experts in enumerate(scenario.trace.expert_TLK.tolist()):
        first = [row[one.index(max(one))] for row, one in zip(experts, weight_TLK[token], strict=True)]
        pairs = list(itertools.product(before[first[layer - 1]], here[first[layer]]))
        moved.append(sum(a != b for a, b in pairs) / len(pairs))
    return sum(moved) / len(moved) * plan.num_layers / (plan.num_layers - 1)


def churn(plan, scenario, layer, problem):
    old, new = holders(problem.current, layer), holders(plan, layer)
    return sum(len(set(new[e]) - set(old[e])) for e in new) * 5e8 / 1e9


def latency(plan, scenario, layer, problem):
    """docs of placement/objectives/latency.py, word by word, for the default links."""
    gpus, loads = holders(plan, layer), scenario.load_LE[layer].tolist()
    G, ep = problem.num_gpus, problem.cluster.ep
    tokens, hidden, weights = ep.tokens_per_gpu * G, 256, 3 * 256 * 64
    work, read = [0.0] * G, [0.0] * G
    for expert, load in enumerate(loads):
        rows, copies = load / sum(loads) * tokens * 2, len(gpus[expert])
        touched = 1 - (1 - load / sum(loads) / copies) ** (tokens * 2)
        for gpu in set(gpus[expert]):
            own = round(rows * gpus[expert].count(gpu) / copies, 6)
            work[gpu] += 2 * weights * (math.ceil(own / 128) * 128 if ep.mode == "ht" else own)
            read[gpu] += touched * 5e8
    rate = 989e12 * 0.6
    speed = problem.cluster.speed_G.tolist()
    experts = max(3e-6 + max(w / (rate * s), r / 3.35e12) for w, r, s in zip(work, read, speed, strict=True))
    if G == 1:
        return experts
    nodes = problem.cluster.num_nodes
    over_gpus, over_nodes = 2.0, 2.0
    if ep.mode == "ht":
        over_gpus, over_nodes = (f(plan, scenario, layer, problem) for f in (gpu_fanout, node_fanout))
    nvlink = over_gpus * (1 - 1 / G if nodes == 1 else 1) * tokens / G / 450e9
    nic = over_nodes * (1 - 1 / nodes) * tokens / G / 50e9
    load = loads_of(plan, scenario, layer)
    wait = 3e-6 + (5e-6 if nodes > 1 else 0.0)
    moved = (hidden + 4 * hidden / 128) + 2 * hidden
    return experts + 2 * wait + max(load) / (sum(load) / G) * max(nvlink, nic) * moved


def of_sum(*parts):
    return lambda *where: sum(weight * part(*where) for weight, part in parts)


BY_LOOPS = {
    "balance": balance,
    "batches": batches,
    "activated": activated,
    "gpu-fanout": gpu_fanout,
    "node-fanout": node_fanout,
    "fanout": fanout,
    "hops": hops,
    "imbalance-price": imbalance_price,
    "latency": latency,
    "churn": churn,
    "fanout+balance": of_sum((1, fanout), (1, imbalance_price)),
    "hops+balance": of_sum((1, hops), (0.23, balance)),
}


def test_every_objective_has_its_loops():
    assert set(BY_LOOPS) == set(OBJECTIVES)
    assert set(BOUNDS) <= set(OBJECTIVES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_equal_plain_loops(name, case):
    problem = CASES[case]()
    plan = solve(problem, solver="random", seed=4)
    for index, scenario in enumerate(problem.scenarios):
        alone = replace(problem, scenarios=(scenario,))
        expected = [BY_LOOPS[name](plan, scenario, layer, problem) for layer in range(plan.num_layers)]
        np.testing.assert_allclose(evaluate_L(OBJECTIVES[name], plan, alone), expected, rtol=1e-9)
        assert OBJECTIVES[name].layers(plan, problem.scenarios[index], problem).shape == (plan.num_layers,)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in NO_TRACE])
def test_objectives_of_tokens_refuse_loads(name):
    problem = Problem.from_loads(np.ones((2, 8)), cluster_of(1, 4))
    plan = solve(problem, solver="contiguous")
    with pytest.raises(ValueError, match="needs a routing trace"):
        evaluate(OBJECTIVES[name], plan, problem)
    assert OBJECTIVES[name].needs_tokens


@pytest.mark.parametrize("name", NO_TRACE)
def test_objectives_of_loads_take_loads(name):
    problem = Problem.from_loads(np.random.default_rng(0).random((2, 8)) + 0.1, cluster_of(1, 4))
    problem = replace(problem, current=solve(problem, solver="contiguous"))
    assert evaluate(OBJECTIVES[name], solve(problem, solver="random"), problem) > 0


@pytest.mark.parametrize("rule", ["max", "mean", "cvar"])
def test_scenarios_are_joined_layer_by_layer(rule):
    value_WL = np.array([[1.0, 9.0], [2.0, 3.0], [6.0, 5.0]])
    by_hand = {"max": [6.0, 9.0], "mean": [3.0, 17 / 3], "cvar": [(6 + 2) / 2, (9 + 5) / 2]}
    np.testing.assert_allclose(join_scenarios(value_WL, rule), by_hand[rule])


# The bound of an objective is below what the best plan reaches, found by trying all.


def all_maps(experts, gpus, slots_per_gpu):
    """Every way to fill GPUs, order within a GPU aside, in which each expert has a copy somewhere."""
    contents = list(itertools.combinations_with_replacement(range(experts), slots_per_gpu))
    for chosen in itertools.product(contents, repeat=gpus):
        row = [e for one in chosen for e in one]
        if len(set(row)) == experts:
            yield row


def with_map(plan, map_LP):
    return replace(plan, physical_to_logical_LP=np.array(map_LP), certificate=None)


TINY = {
    "two GPUs": (cluster_of(1, 2), 4, 0),
    "two GPUs, copies": (cluster_of(1, 2), 4, 2),
    "two nodes, copies": (cluster_of(2, 1), 4, 2),
    "uneven speeds": (cluster_of(1, 2, [1.0, 0.5]), 4, 2),
    "three GPUs": (cluster_of(1, 3), 6, 0),
    "quota": (cluster_of(1, 2, dispatch="quota"), 4, 2),
    "nearest": (cluster_of(1, 2, dispatch="nearest"), 4, 2),
}
EXPRESSIONS = (*OBJECTIVES, "fanout+2*balance", "balance<=1.1,fanout", "balance+0.5*churn", "0.5*activated+gpu-fanout")


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_bounds_are_below_the_best_of_all_plans(text, case):
    cluster, experts, replicas = TINY[case]
    objective = find_objective(text)
    for seed in range(1 if experts > 4 else 2):
        problem = traced(cluster, replicas=replicas, experts=experts, tokens=12, layers=1, seed=seed)
        plan = solve(problem, solver="contiguous")
        bound = objective_bound(objective, problem, plan, "max")
        if bound is None:
            assert text == "latency"
            return
        maps = all_maps(experts, problem.num_gpus, problem.slots_per_gpu)
        best = min(evaluate(objective, with_map(plan, [row]), problem) for row in maps)
        assert 0 <= bound.value <= best + 1e-9
        assert bound.value_L.mean() == pytest.approx(bound.value)


@pytest.mark.parametrize("rule", ["max", "mean", "cvar"])
def test_bounds_hold_for_every_way_to_join_scenarios(rule):
    cluster, experts, replicas = TINY["two GPUs, copies"]
    for text in ("balance", "fanout+balance", "activated"):
        objective = find_objective(text)
        problem = traced(cluster, replicas=replicas, experts=experts, tokens=12, layers=1, scenarios=3)
        plan = solve(problem, solver="contiguous")
        bound = objective_bound(objective, problem, plan, rule)
        maps = all_maps(experts, problem.num_gpus, problem.slots_per_gpu)
        assert bound.value <= min(evaluate(objective, with_map(plan, [row]), problem, rule) for row in maps) + 1e-9


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    hot=st.integers(1, 4),
    replicas=st.sampled_from([0, 2, 4]),
    speeds=st.sampled_from([None, (1.0, 0.5), (2.0, 1.0)]),
)
def test_balance_bounds_hold_where_few_experts_are_hot(seed, hot, replicas, speeds):
    load = np.zeros((1, 4))
    load[0, :hot] = np.random.default_rng(seed).pareto(1.2, hot) + 0.01
    problem = Problem.from_loads(load, cluster_of(1, 2, speeds), replicas=replicas)
    plan = solve(problem, solver="contiguous")
    bound = objective_bound(OBJECTIVES["balance"], problem, plan, "max")
    maps = all_maps(4, 2, problem.slots_per_gpu)
    assert bound.value <= min(evaluate(OBJECTIVES["balance"], with_map(plan, [row]), problem) for row in maps) + 1e-9


@pytest.mark.parametrize("case", ["one node", "copies", "low latency mode"])
def test_the_parts_of_latency_add_up(case):
    problem = CASES[case]()
    plan, scenario = solve(problem, solver="random"), problem.scenarios[0]
    times = layer_times(plan, scenario.load_LE, scenario.trace)
    assert times.experts_s + times.traffic_s == pytest.approx(evaluate(OBJECTIVES["latency"], plan, problem))
    step_s = plan.num_layers * (times.experts_s + times.traffic_s)
    assert times.tokens_per_s == pytest.approx(problem.cluster.ep.tokens_per_gpu / step_s)


# Weights: what the searches may know of an objective.


SUMS = ("2*fanout+0.5*node-fanout", "balance+3*churn", "balance<=1.1,fanout+balance")


@pytest.mark.parametrize("text", [*OBJECTIVES, *SUMS])
@pytest.mark.parametrize("case", ["one node", "two nodes", "copies"])
def test_weights_are_the_objective(text, case):
    problem = CASES[case]()
    objective, plan = find_objective(text), solve(problem, solver="random", seed=2)
    weights = objective.weights(problem.cluster)
    if weights == PartWeights():
        assert text in ("activated", "batches", "latency")
        return
    part = {name: evaluate_L(OBJECTIVES[name], plan, problem) for name in OBJECTIVES}
    first = np.maximum(part["balance"] - weights.goal, 0) if weights.goal else part["balance"]
    if text == "balance<=1.1,fanout+balance":  # one goal for all imbalance: the search's picture, not the value
        assert (weights.level, weights.goal) == (100 + (1.8 if case == "one node" else 1.0), 1.1)
        return
    expected = weights.fan * part["gpu-fanout"] + weights.node * part["node-fanout"] + weights.level * first
    expected = expected + weights.hops * part["hops"] + weights.churn * part["churn"]
    np.testing.assert_allclose(evaluate_L(objective, plan, problem), expected)


# Expressions are read once, and refused with the reason.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fanout+2*balance", [(1, "fanout", None), (2, "balance", None)]),
        ("balance<=1.1,fanout", [(100, "balance", 1.1), (1, "fanout", None)]),
        ("balance<=1.2,gpu-fanout<=3,hops", [(1e4, "balance", 1.2), (100, "gpu-fanout", 3), (1, "hops", None)]),
        ("balance+10*churn", [(1, "balance", None), (10, "churn", None)]),
        ("fanout+balance+10*churn", [(1, "fanout", None), (1, "imbalance-price", None), (10, "churn", None)]),
        ("balance<=1.1,fanout+10*churn", [(100, "balance", 1.1), (1, "fanout", None), (10, "churn", None)]),
        ("1e1*activated", [(10, "activated", None)]),
    ],
)
def test_expressions_become_terms(text, parts):
    objective = find_objective(text)
    assert [(t.weight, t.part.name, t.goal) for t in objective.terms] == parts
    assert objective.name == text
    assert find_objective(objective.name).terms == objective.terms


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fanaut", "did you mean 'fanout'"),
        ("", "unknown objective ''"),
        ("balance,fanout", "needs a goal, for instance balance<=1.1"),
        ("balance<=much,fanout", "goal of balance must be a number"),
        ("balance<=nan,fanout", "goal of balance must be a number"),
        ("x*balance", "weight in 'x\\*balance' must be a number"),
        ("-1*balance", "number that is not negative; got -1"),
        ("nan*balance", "number that is not negative"),
        ("inf*balance", "number that is not negative"),
        ("2*magic<=3", "unknown objective 'magic'"),
    ],
)
def test_expressions_are_refused_with_the_reason(text, words):
    with pytest.raises(ValueError, match=words):
        find_objective(text)


def test_an_objective_of_your_own_is_searched_scored_and_summed():
    """Docs: any exact function of a plan; it has no bound, and weights only if it says so."""

    def hottest(plan: Plan, scenario: Scenario, problem: Problem):
        return np.array([float(np.isin(row[: plan.slots_per_gpu], 0).sum()) for row in plan.physical_to_logical_LP])

    own = Objective("expert 0 on GPU 0", hottest, needs_tokens=False)
    problem = Problem.from_loads(np.ones((2, 8)), cluster_of(1, 4))
    plan = solve(problem, objective=own, time_limit_s=1)
    assert plan.certificate.bound is None
    assert plan.certificate.objective == evaluate(own, plan, problem)
    both = weighted([(2.0, "balance<=1.5")])
    assert evaluate(both, plan, problem) == pytest.approx(0)
    same_name = Objective("balance", hottest, needs_tokens=False)
    assert objective_bound(same_name, problem, plan, "max") is None
