"""Tiers on a cluster: equal to brute force, bounds that hold, chains that add up as written, every home served."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Plan, Problem, generate_trace
from placement.data.batches import count_rows_AE, decode_batches, traffic_batches
from placement.ilp.tiers import solve_tiers
from placement.solving.cluster_tiers import solve_cluster_tiers
from placement.tiers.layout import ways_of_plan
from placement.tiers.model import seconds_of, tier_model
from placement.tiers.relaxation import Multipliers, dual_value, even_multipliers, relax
from routing.traces import RoutingTrace

EXPERT_BYTES = 1e6


def cluster(nodes=1, gpus=1, slots=(2, 2, 99), **tiers):
    """Slots of a GPU, of a host memory and of an SSD."""
    gpu, host, ssd = (max(count, 0.5) * EXPERT_BYTES for count in slots)
    node = {
        "gpus": {"type": "g", "count": gpus},
        "nvlink": 5e8,
        "nic": {"bandwidth": 1e8},
        "pcie": 5e7,
        "cpu": {"bandwidth": 2e7, "flops": 1e9},
        "dram": {"size": max(host, 1e6), "bandwidth": 6e7},
        "ssd": {"size": max(ssd, 1e6), "bandwidth": 1e7},
    }
    return Cluster.from_mapping(
        {
            "model": {"expert_bytes": EXPERT_BYTES, "hidden": 64, "moe_intermediate": 64},
            "gpu_types": {"g": {"memory": max(gpu, 1e6), "hbm": 1e9, "flops": {"bf16": 1e10}}},
            "node_types": {"n": node},
            "nodes": [{"type": "n", "count": nodes}],
            "tiers": tiers,
        }
    )


def problem(machines, layers=2, experts=4, seed=0):
    trace = generate_trace(tokens=400, layers=layers, experts=experts, top_k=2, blocks=2, seed=seed)
    return Problem.from_trace(trace, machines, replicas=-experts % machines.num_gpus)


def brute_force(model):
    """Least seconds over all assignments of all layers that fit."""
    L, E, Y = model.shape
    options = np.array(list(itertools.product(range(Y), repeat=E)))
    seconds, used = [], []
    for layer in range(L):
        cost_WEYH = model.chain_costs_WEYH(layer)
        load = sum(cost_WEYH[:, e, options[:, e]] for e in range(E)).swapaxes(0, 1)
        seconds.append(model.layer_seconds(load))
        pools = np.stack([(model.ways.pool_Y[options] == u).sum(axis=1) for u in range(len(model.ways.capacity_U))], 1)
        used.append(pools * model.bytes_L[layer])
    best = np.inf
    for i in np.argsort(seconds[0]):
        if L == 1:
            total, full = seconds[0][i : i + 1], used[0][i : i + 1]
        else:
            total, full = seconds[0][i] + seconds[1], used[0][i] + used[1]
        fits = (full <= model.ways.capacity_U * (1 + 1e-9)).all(axis=1)
        best = min(best, total[fits].min(initial=np.inf))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("nodes", "gpus", "experts"), [(1, 1, 4), (2, 1, 2), (1, 2, 3)])
def test_plans_equal_brute_force_on_random_small_clusters(nodes, gpus, experts, seed):
    draw = np.random.default_rng(seed)
    slots = tuple(int(n) for n in draw.integers(1, 4, size=2))
    steps = {"batch": int(draw.integers(1, 9)), "overlap": bool(draw.integers(2))}
    steps |= {"chunk": 32, "chunk_weight": 0.3} if draw.integers(2) else {}
    asked = problem(cluster(nodes, gpus, (*slots, 99), **steps), experts=experts, seed=seed)
    best = brute_force(tier_model(asked))
    plan = solve_cluster_tiers(asked, solver="ilp", time_limit_s=20, seed=seed)
    assert plan.certificate.objective == pytest.approx(best, rel=1e-4)
    assert plan.certificate.bound <= best * (1 + 1e-9)
    assert plan.certificate.is_proven_optimal


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_multipliers_bound_any_plan(seed):
    draw = np.random.default_rng(seed)
    nodes, gpus = int(draw.integers(1, 3)), int(draw.integers(1, 3))
    asked = problem(cluster(nodes, gpus, (2, 2, 4), batch=4, overlap=bool(draw.integers(2))), seed=seed % 50)
    model = tier_model(asked)
    way_LE = random_plan(model, draw)
    raw = draw.random((len(model.weight_W), model.shape[0], len(model.ways.group_H)))
    for group in np.unique(model.ways.group_H):
        mine = model.ways.group_H == group
        raw[:, :, mine] *= model.weight_W[:, None, None] / raw[:, :, mine].sum(axis=2, keepdims=True)
    price_U = draw.random(len(model.ways.capacity_U)) * 1e-9
    assert dual_value(model, Multipliers(chain_WLH=raw, price_U=price_U)) <= model.seconds(way_LE) * (1 + 1e-9)
    relaxed = relax(model, 10)
    assert relaxed.bound <= model.seconds(way_LE) * (1 + 1e-9)
    assert relaxed.bound >= dual_value(model, even_multipliers(model)) * (1 - 1e-9)


def random_plan(model, draw):
    """Ways at random that keep every capacity."""
    L, E, _ = model.shape
    left_U, way_LE = model.ways.capacity_U.copy(), np.zeros((L, E), int)
    for layer, expert in itertools.product(range(L), range(E)):
        room = np.flatnonzero(left_U[model.ways.pool_Y] >= model.bytes_L[layer] * (1 - 1e-9))
        way_LE[layer, expert] = draw.choice(room)
        left_U[model.ways.pool_Y[way_LE[layer, expert]]] -= model.bytes_L[layer]
    return way_LE


def test_multipliers_that_prove_too_much_are_refused():
    model = tier_model(problem(cluster(batch=4)))
    valid = even_multipliers(model)
    for bad in (
        Multipliers(chain_WLH=valid.chain_WLH * 2, price_U=valid.price_U),
        Multipliers(chain_WLH=-valid.chain_WLH, price_U=valid.price_U),
        Multipliers(chain_WLH=valid.chain_WLH, price_U=valid.price_U - 1),
    ):
        with pytest.raises(ValueError, match="multipliers"):
            dual_value(model, bad)


@given(rows=st.lists(st.integers(0, 40), min_size=1, max_size=5), curve=st.booleans())
def test_an_expert_in_parts_costs_at_least_its_part_of_the_whole(rows, curve):
    """What makes the floor valid for plans with copies: seconds per row never rise with rows."""
    machines = cluster()
    if curve:
        object.__setattr__(machines, "curves", (((1, 3e-3), (8, 4e-3), (32, 1.2e-2)),))
    for name in ("gpu", "cpu", "dram", "pcie", "ssd", "nic"):
        each = [float(seconds_of(machines, name, 0, np.array([float(n)]), EXPERT_BYTES)[0]) for n in [*rows, sum(rows)]]
        assert sum(each[:-1]) >= each[-1] * (1 - 1e-12)


def test_seconds_of_a_layer_computed_by_hand():
    """One token per step, two experts: GPU 1 MB at 1 GB/s; CPU 1 MB at 20 MB/s; both in every step."""
    trace = RoutingTrace(expert_TLK=np.array([[[0, 1]]] * 4, np.int16), sequence_T=np.zeros(4, np.int32))
    for overlap, seconds in ((True, 0.05), (False, 0.001 + 0.05)):
        asked = Problem.from_trace(trace, cluster(slots=(1, 1, 1), overlap=overlap))
        model = tier_model(asked)
        names = [(way.place, way.streamed) for way in model.ways.ways]
        way_LE = np.array([[names.index(("gpu", False)), names.index(("host", False))]])
        assert model.seconds(way_LE) == pytest.approx(seconds)
    streamed = np.array([[names.index(("gpu", False)), names.index(("host", True))]])
    assert model.seconds(streamed) == pytest.approx(0.001 + 1 / 50 + 0.001)
    on_ssd = np.array([[names.index(("gpu", False)), names.index(("ssd", True))]])
    assert model.seconds(on_ssd) == pytest.approx(0.001 + 1 / 10 + 1 / 50 + 0.001)


def test_steps_count_the_experts_that_tokens_touch_together():
    """Two lanes that always agree touch one expert per step, where independence would say one and a half."""
    expert_TLK = np.array([[[0]], [[1]], [[0]], [[1]]], np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.array([0, 0, 1, 1], np.int32))
    batches = decode_batches(trace, 2)
    assert batches.tolist() == [[0, 2], [1, 3]]
    assert count_rows_AE(trace, batches, 0).tolist() == [[2, 0], [0, 2]]
    assert traffic_batches(trace, 2).tolist() == [[0, 1], [2, 3]]
    assert count_rows_AE(trace, traffic_batches(trace, 2), 0).tolist() == [[1, 1], [1, 1]]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 5))
def test_decode_batches_keep_the_order_of_every_sequence(lengths, size):
    sequence_T = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    if len(sequence_T) < size:
        return
    trace = RoutingTrace(expert_TLK=np.zeros((len(sequence_T), 1, 1), np.int16), sequence_T=sequence_T)
    batches = decode_batches(trace, size)
    flat = batches.ravel().tolist()
    assert len(set(flat)) == len(flat)
    if len(lengths) >= size:
        for sequence in range(len(lengths)):
            steps = [step for step, row in enumerate(batches.tolist()) for t in row if sequence_T[t] == sequence]
            rows = [t for row in batches.tolist() for t in row if sequence_T[t] == sequence]
            assert rows == sorted(rows)
            assert steps == sorted(set(steps))


def test_what_does_not_fit_goes_to_lower_tiers_and_the_file_keeps_it(tmp_path):
    asked = problem(cluster(nodes=2, gpus=2, slots=(1, 1, 9), batch=4), experts=8)
    plan = solve_cluster_tiers(asked, time_limit_s=3)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.to_json() == plan.to_json()
    assert np.array_equal(ways_of_plan(tier_model(asked), loaded), ways_of_plan(tier_model(asked), plan))
    assert (plan.copies_LEG.sum(), plan.homes.host_LEM.astype(bool).sum()) == (4, 2)
    assert plan.homes.ssd_LEM.astype(bool).sum() == 16 - 4 - 2


def test_shortage_is_named():
    with pytest.raises(ValueError, match=r"need .* missing; add nodes, a larger dram"):
        tier_model(problem(cluster(slots=(1, 1, 1)), experts=4))


def test_required_gpus_leave_no_other_way():
    machines = cluster(slots=(8, 8, 8), gpu="required")
    model = tier_model(problem(machines))
    assert {way.place for way in model.ways.ways} == {"gpu"}
    with pytest.raises(ValueError, match="3 slots fit"):
        tier_model(problem(cluster(slots=(7, 99, 99), gpu="required"), experts=4))


def test_the_programme_of_some_layers_leaves_the_others():
    asked = problem(cluster(slots=(2, 2, 9), batch=2))
    model = tier_model(asked)
    start_LE = random_plan(model, np.random.default_rng(3))
    others = np.bincount(model.ways.pool_Y[start_LE[0]], minlength=3) * EXPERT_BYTES
    way_LE, result = solve_tiers(model, [1], model.ways.capacity_U - others, start_LE, time_limit_s=10)
    assert np.array_equal(way_LE[0], start_LE[0])
    assert model.seconds(way_LE) <= model.seconds(start_LE)
    assert result.is_optimal


def test_slow_gpus_and_types_get_fewer_experts():
    """Of two GPUs, one with half the bandwidth: with room for all on both, the fast one serves more."""
    spec = {
        "model": {"expert_bytes": 1e6},
        "gpu_types": {"a": {"memory": 1e8, "hbm": 4e9}, "b": {"memory": 1e8, "hbm": 1e9}},
        "node_types": {"n": {"gpus": {"type": "a", "count": 2}}},
        "nodes": [{"type": "n", "gpus": {1: {"type": "b"}}}],
        "tiers": {"batch": 64},
    }
    loads = np.ones((1, 10))
    plan = solve_cluster_tiers(Problem.from_loads(loads, Cluster.from_mapping(spec)), time_limit_s=3)
    assert plan.copies_LEG.sum(axis=(0, 1)).tolist() == [8, 2]
