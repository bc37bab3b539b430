"""The first plan: valid, least peak per copy nearly reached, as balanced as EPLB, whatever the loads."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import eplb, generate_loads
from placement.heuristics.first import first_LP, threshold_counts_LE
from placement.heuristics.replication import replicate_LE


def balancedness(load_LE, map_LP, gpus):
    L, E = load_LE.shape
    copies_LE = np.stack([np.bincount(row, minlength=E) for row in map_LP])
    load_LG = np.take_along_axis(load_LE / copies_LE, map_LP, axis=1).reshape(L, gpus, -1).sum(axis=2)
    return float((load_LG.mean(axis=1) / load_LG.max(axis=1)).mean())


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 12),
    gpus=st.integers(1, 6),
    extra=st.integers(0, 30),
    seed=st.integers(0, 10**6),
    hot=st.booleans(),
)
def test_any_loads_give_a_whole_plan(experts, gpus, extra, seed, hot):
    per_gpu = min(experts, -(-experts // gpus) + extra // gpus)
    slots = per_gpu * gpus
    draw = np.random.default_rng(seed)
    load_LE = draw.random((3, experts)) * (draw.random((3, experts)) < 0.5)
    load_LE[0] = 0
    if hot:
        load_LE[1, 0] = 1000
    map_LP = first_LP(load_LE, slots, gpus)
    for row in map_LP.reshape(3, gpus, per_gpu):
        assert set(row.ravel().tolist()) == set(range(experts))
    count_LE = threshold_counts_LE(load_LE, slots, gpus)
    assert (count_LE.sum(axis=1) == slots).all()
    assert (count_LE >= 1).all()
    assert (count_LE <= gpus).all()
    least_LE = replicate_LE(load_LE[None], slots, gpus)
    assert ((load_LE / count_LE).max(axis=1) <= (load_LE / least_LE).max(axis=1) * 1.05 + 1e-9).all()


def test_it_is_as_balanced_as_eplb():
    load_LE = generate_loads()[3:]
    for slots, gpus in ((288, 32), (320, 64), (256, 32)):
        theirs = balancedness(load_LE, eplb(load_LE, slots, 1, 1, gpus), gpus)
        assert balancedness(load_LE, first_LP(load_LE, slots, gpus), gpus) >= theirs - 1e-3
