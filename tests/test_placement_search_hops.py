import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import Cluster, Problem, solve
from placement.data.generators import generate_trace
from placement.objectives.hops import hop_share
from placement.search.hops.annealing import ChainAnnealing, ChainTask


def make_annealing(seed, *, gpus=4, layers=4, copies=False, price=0.3, floor=None, saved=None):
    random = np.random.default_rng(seed)
    items = 3 * gpus
    expert = np.tile(np.arange(items), (layers, 1))
    if copies:
        expert[:, -1] = expert[:, 0]
    start = np.tile(np.arange(items) // 3, (layers, 1))
    pair = random.dirichlet(np.ones(items * items), layers - 1).reshape(-1, items, items)
    weight = random.dirichlet(np.ones(items), (layers, 2))
    speed = np.ones(gpus) if saved is None else random.uniform(0.5, 1.5, gpus)
    saved = np.eye(gpus) if saved is None else saved
    task = ChainTask(
        pair_LXX=pair, saved_GG=saved, weight_LWX=weight, speed_G=speed, expert_LX=expert, price=price, floor=floor
    )
    return ChainAnnealing(task, start, seed), pair, weight, speed


def cost(annealing, pair, weight, speed):
    """By definition: price * mean level of the folds, minus what staying close saves."""
    gpu = annealing.gpu_LX
    saved = sum((one * annealing.saved_GG[gpu[layer][:, None], gpu[layer + 1]]).sum() for layer, one in enumerate(pair))
    level = 0.0
    for layer, weight_WX in enumerate(weight):
        load = np.stack([np.bincount(gpu[layer], weights=w, minlength=annealing.G) for w in weight_WX])
        level += (load / speed * speed.sum()).max(axis=1).mean()
    return annealing.price * level - saved


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), gpus=st.sampled_from([2, 3, 5]), asymmetric=st.booleans())
def test_every_swap_change_is_exact(seed, gpus, asymmetric):
    saved = np.random.default_rng(seed).random((gpus, gpus)) if asymmetric else None
    annealing, pair, weight, speed = make_annealing(seed, gpus=gpus, saved=saved)
    annealing.run(20, float("inf"))
    for parity in (0, 1):
        half = slice(parity, annealing.L, 2)
        gpu_AX = annealing.gpu_LX[half]
        level_change, _ = annealing._level_change(half, gpu_AX)
        change = annealing._hop_change(half, gpu_AX) + annealing.price * level_change
        before = cost(annealing, pair, weight, speed)
        for x, y in ((0, annealing.X - 1), (2, 4)):
            layer = parity
            if annealing.gpu_LX[layer, x] == annealing.gpu_LX[layer, y]:
                continue
            annealing._swap(np.array([layer]), np.array([x]), np.array([y]))
            assert cost(annealing, pair, weight, speed) - before == pytest.approx(change[0, x, y], abs=1e-5)
            annealing._swap(np.array([layer]), np.array([x]), np.array([y]))


def test_copies_of_an_expert_never_share_a_gpu():
    annealing, *_ = make_annealing(1, copies=True)
    gpu_LX = annealing.run(500, float("inf"))
    assert (gpu_LX[:, 0] != gpu_LX[:, -1]).all()
    assert all(np.bincount(row).tolist() == [3, 3, 3, 3] for row in gpu_LX)


def test_crossed_threads_are_mended_by_exchanging_tails():
    annealing, *_ = make_annealing(0, price=0.0)
    annealing.ahead_LXX[:-1] = np.eye(12, dtype=np.float32) / 12
    crossed = annealing.gpu_LX.copy()
    crossed[2:] = np.array([1, 0, 2, 3])[crossed[2:]]
    annealing.gpu_LX[:] = crossed
    annealing.member_LXG[:] = crossed[:, :, None] == np.arange(4)
    annealing._swap_tails(1e-6)
    assert (annealing.gpu_LX == annealing.gpu_LX[0]).all()
    assert (annealing.member_LXG.argmax(axis=2) == annealing.gpu_LX).all()


def test_price_follows_the_balance_floor():
    prices = []
    for floor in (0.3, 0.99):
        annealing, *_ = make_annealing(3, floor=floor)
        annealing.run(600, float("inf"))
        prices.append(annealing.price)
    assert prices[0] < 0.3 < prices[1]


@pytest.mark.slow
def test_hops_alone_do_not_pile_up_the_popular_experts():
    trace = generate_trace(tokens=1500, layers=4, experts=16, top_k=2, blocks=4, tokens_per_sequence=20)
    problem = Problem.from_trace(trace, Cluster.grid(1, 4))
    plan = solve(problem, objective="hops", time_limit_s=4)
    piled = solve(problem, objective="hops", time_limit_s=4, balance_floor=0.01)
    base = solve(problem, solver="contiguous")
    assert plan.certificate.in_sample["balancedness"] > 0.8
    assert hop_share(piled, trace) <= hop_share(plan, trace) < hop_share(base, trace)
