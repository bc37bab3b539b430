"""SRP, SCH, hit-rate curves and `trace show`: by hand, against plain loops, against offload's caches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments import cli
from offload import simulate
from routing.report.locality import locality
from routing.traces import (
    EMPTY,
    RoutingTrace,
    belady_hits_LC,
    longest_sequence,
    lru_hits_LC,
    reuse,
    reuse_distance_TK,
    segment_cache_rate_C,
    segment_cache_rate_LC,
    segment_routing,
)

any_experts = hnp.arrays(
    np.int16, st.tuples(st.integers(1, 14), st.integers(1, 3), st.integers(1, 3)), elements=st.integers(-1, 5)
)


def make_trace(expert_TLK, sequences=None, num_experts=6):
    expert_TLK = np.asarray(expert_TLK, np.int16)
    sequence_T = np.zeros(len(expert_TLK), np.int32) if sequences is None else np.asarray(sequences, np.int32)
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=sequence_T, metadata={"num_experts": num_experts})


@pytest.fixture
def random_trace():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(120, 2, 8)) + np.repeat(rng.normal(size=(6, 2, 8)), 20, axis=0) * 2
    return make_trace(np.argsort(-scores, axis=-1)[:, :, :2], np.repeat(np.arange(4), 30), 8)


# --- SRP ------------------------------------------------------------------------------------------------------------


def test_srp_of_constant_routing_is_one():
    result = segment_routing(make_trace([[[0, 1]]] * 10), 4)
    assert (result.f1, result.cache_ratio) == (1.0, 1.0)


def test_srp_by_hand():
    """Windows (0, 1) and (1, 1): keeping f >= 1 keeps 3 sets: F1 = 2*4/(2*3+4); f >= 2 keeps 1: 2*2/(2*1+4)."""
    result = segment_routing(make_trace([[[0]], [[1]], [[1]]]), 2)
    assert result.f1 == pytest.approx(8 / 10)
    assert (result.threshold, result.cache_ratio) == (1, 1.5)


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_srp_equals_plain_counting(random_trace, window, layer):
    """Every window of every sequence, every threshold."""
    uses = []
    for sequence in range(4):
        rows = random_trace.expert_TLK[random_trace.sequence_T == sequence]
        for start in range(len(rows) - window + 1):
            for each in (0, 1) if layer is None else (layer,):
                uses += [int((rows[start : start + window, each] == expert).sum()) for expert in range(8)]
    f1 = [
        2 * sum(f for f in uses if f >= a) / (window * sum(f >= a for f in uses) + sum(uses))
        for a in range(1, window + 1)
    ]
    assert segment_routing(random_trace, window, layer).f1 == pytest.approx(max(f1))


def test_srp_of_a_layer_that_uses_nothing_is_zero():
    assert segment_routing(make_trace([[[EMPTY]]] * 4), 2).f1 == 0


@pytest.mark.parametrize("window", [2, 5, 16])
def test_srp_optimum_satisfies_its_equation(random_trace, window):
    result = segment_routing(random_trace, window)
    assert 0 < result.f1 <= 1
    assert abs(result.threshold - window / 2 * result.f1) <= 1


def test_windows_do_not_cross_sequences():
    trace = make_trace([[[0]], [[1]], [[0]], [[1]]], [0, 0, 1, 1])
    assert longest_sequence(trace) == 2
    with pytest.raises(ValueError, match="no sequence of this trace has 3 tokens"):
        segment_routing(trace, 3)
    with pytest.raises(ValueError, match="no sequence of this trace has 9 tokens"):
        segment_routing(trace, 9)
    with pytest.raises(ValueError, match="a window has at least 1 token; got 0"):
        segment_routing(trace, 0)


# --- SCH ------------------------------------------------------------------------------------------------------------


def plain_sch(trace, ratio, window):
    """The definition, token by token, with sets; ties by what was named last."""
    T, L, K = trace.expert_TLK.shape
    demanded = [[(layer, int(expert)) for layer in range(L) for expert in row[layer]] for row in trace.expert_TLK]
    resident, last, hits = set(), {}, 0
    for token in range(T):
        hits += len(resident & set(demanded[token]))
        resident |= set(demanded[token])
        last |= {key: token * L * K + slot for slot, key in enumerate(demanded[token])}

        def worth(key, after=token + 1, last=last):
            if window is None:
                ahead = [later for later in range(after, T) if key in demanded[later]]
                return (-ahead[0] if ahead else -T, last[key])
            return (sum(key in later for later in demanded[after : after + window]), last[key])

        resident = set(sorted(resident, key=worth)[-int(ratio * L * K) :])
    return hits / (T * L * K)


@pytest.mark.parametrize("window", [1, 3, 16, None])
def test_sch_equals_plain_sets(random_trace, window):
    ratios = (1, 1.5, 2, 3)
    assert segment_cache_rate_C(random_trace, ratios, window).tolist() == pytest.approx(
        [plain_sch(random_trace, ratio, window) for ratio in ratios]
    )
    for layer, rates in enumerate(segment_cache_rate_LC(random_trace, ratios, window)):
        alone = make_trace(random_trace.expert_TLK[:, layer : layer + 1], num_experts=8)
        assert rates.tolist() == pytest.approx([plain_sch(alone, ratio, window) for ratio in ratios])


def test_sch_grows_with_the_cache_and_with_what_it_knows(random_trace):
    ratios = (1, 2, 3, 4)
    some, everything = (segment_cache_rate_C(random_trace, ratios, window) for window in (16, None))
    assert some.tolist() == sorted(some)
    assert (everything >= some - 1e-9).all()
    assert everything[-1] == pytest.approx(1 - 16 / (120 * 4))


def test_sch_by_hand():
    """Room for one, experts 0 1 0 0: the 1, never used again, leaves at once, so both later 0 hit."""
    trace = make_trace([[[0]], [[1]], [[0]], [[0]]])
    assert segment_cache_rate_C(trace, [1], None).tolist() == [0.5]
    with pytest.raises(ValueError, match=r"ratio 0\.5 leaves no room"):
        segment_cache_rate_C(trace, [0.5], None)


# --- hit-rate curves ------------------------------------------------------------------------------------------------


def plain_reuse(expert_TK):
    """Places in a list of experts by recency."""
    recency, distances = [], []
    for row in expert_TK.tolist():
        distances.append([recency.index(expert) if expert in recency else -1 for expert in row])
        for expert in row:
            if expert != EMPTY:
                recency = [expert, *(other for other in recency if other != expert)]
    return distances


@settings(max_examples=60, deadline=None)
@given(any_experts, st.integers(1, 14))
def test_reuse_distances_equal_places_in_a_list(expert_TLK, block_rows):
    trace = make_trace(expert_TLK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "BLOCK_ROWS", block_rows)
        for layer in range(trace.num_layers):
            assert reuse_distance_TK(trace, layer).tolist() == plain_reuse(trace.expert_TLK[:, layer])


@settings(max_examples=60, deadline=None)
@given(any_experts)
def test_beladys_curve_equals_the_simulated_cache(expert_TLK):
    trace = make_trace(expert_TLK)
    sizes = range(trace.top_k, 7)
    hits_LC = belady_hits_LC(trace, sizes)
    for column, size in enumerate(sizes):
        assert hits_LC[:, column].tolist() == simulate(trace, size, policies=["belady"])["belady"].hits_L.tolist()


def best_with_bypass(expert_T, slots):
    """Most hits of any cache of one layer and one expert per token that may leave an expert out: every choice tried."""
    states = {frozenset(): 0}
    for expert in expert_T:
        following = {}
        for held, hits in states.items():
            hits += expert in held
            loaded = held | {expert}
            choices = [held, loaded] if len(loaded) <= slots else [held, *(loaded - {out} for out in loaded)]
            for choice in choices:
                following[choice] = max(following.get(choice, 0), hits)
        states = following
    return max(states.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=10), st.integers(1, 4))
def test_belady_with_bypass_is_the_best_of_all_caches(expert_T, slots):
    trace = make_trace(np.array(expert_T)[:, None, None], num_experts=5)
    hits = belady_hits_LC(trace, [slots], may_bypass=True)
    assert hits.tolist() == [[best_with_bypass(expert_T, slots)]]


@settings(max_examples=60, deadline=None)
@given(any_experts)
def test_no_rate_of_the_report_exceeds_the_bound(expert_TLK):
    for slot in range(1, expert_TLK.shape[2]):  # a router picks an expert once
        is_again = (expert_TLK[:, :, slot : slot + 1] == expert_TLK[:, :, :slot]).any(axis=2)
        expert_TLK[:, :, slot][is_again] = EMPTY
    trace = make_trace(expert_TLK)
    for layer in locality(trace)["per_layer"]:
        for rates in layer["hit_rate"].values():
            others = [rates[name] for name in ("lru", "most_used", "belady")]
            assert rates["belady_bypass"] >= max(others) - 1e-12


def test_lru_curve_equals_the_simulated_cache(random_trace):
    hits = lru_hits_LC(random_trace)
    for capacity in (2, 5, 8):
        simulated = simulate(random_trace, capacity, policies=["lru"])["lru"]
        assert hits[:, capacity].tolist() == simulated.hits_L.tolist()


def test_belady_needs_room_for_a_token(random_trace):
    with pytest.raises(ValueError, match="1 slots do not hold the 2 experts of one token"):
        belady_hits_LC(random_trace, [1, 4])


# --- the command ----------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["expertier", "trace", "show", *map(str, arguments)])
    with pytest.raises(SystemExit) as finished:
        cli.main()
    return finished.value.code or 0


def test_show_has_balance_srp_sch_and_curves_per_layer(random_trace, tmp_path, monkeypatch, capsys):
    random_trace.save(tmp_path / "t.npz")
    files = ["--json", tmp_path / "r.json", "--plot", tmp_path / "r.svg"]
    assert run(monkeypatch, tmp_path / "t.npz", "--rows", 90, *files) == 0
    report, part = json.loads((tmp_path / "r.json").read_text()), random_trace.rows(0, 90)
    assert (report["tokens"], report["rows"], report["layers"]) == (120, 90, 2)
    assert report["srp"]["16"]["f1"] == segment_routing(part, 16).f1
    assert set(report["srp"]) == {"4", "16"}
    layer = report["per_layer"][1]
    assert layer["srp"]["4"]["f1"] == segment_routing(part, 4, 1).f1
    assert layer["sch"]["2"]["16"] == segment_cache_rate_LC(part, [2], 16)[1, 0]
    simulated = simulate(part, 4, policies=["lru", "belady"])
    for name, result in simulated.items():
        assert layer["hit_rate"]["4"][name] == pytest.approx(result.hit_rate_L[1])
        assert report["hit_rate"]["4"][name] == pytest.approx(result.hit_rate)
    assert layer["hit_rate"]["8"]["lru"] == layer["hit_rate"]["8"]["most_used"] == layer["hit_rate"]["8"]["belady"]
    assert {"layer", "skew", "entropy", "dead_experts", "median_reuse_distance"} <= layer.keys()
    assert "</svg>" in (tmp_path / "r.svg").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert all(words in said for words in ("Belady", "admit", "bypass", "bound"))


@pytest.mark.parametrize(
    "expert_TLK", [[[[0]]], [[[EMPTY, EMPTY]]] * 3, [[[0, 1, 2, 3, 4, 5]]] * 5], ids=["one access", "none", "all"]
)
def test_show_bears_odd_traces(expert_TLK, tmp_path, monkeypatch):
    make_trace(expert_TLK).save(tmp_path / "t.npz")
    assert run(monkeypatch, tmp_path / "t.npz", "--plot", tmp_path / "r.png", "--json", tmp_path / "r.json") == 0


def test_show_refuses_what_it_cannot_do(random_trace, tmp_path, monkeypatch, capsys):
    random_trace.save(tmp_path / "t.npz")
    random_trace.rows(0, 0).save(tmp_path / "empty.npz")
    assert run(monkeypatch, tmp_path / "empty.npz") == 2
    assert run(monkeypatch, tmp_path / "t.npz", "--plot", tmp_path / "no" / "r.png") == 2
    assert run(monkeypatch, tmp_path / "t.npz", "--plot", tmp_path / "r.txtx") == 2
    error = capsys.readouterr().err
    assert "it has no rows" in error
    assert "does not exist; create it first" in error
