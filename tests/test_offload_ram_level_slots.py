"""Experts in levels while a model runs: what is read first, how deep slots are, and what is computed from what."""

import json
import random
from queue import SimpleQueue
from threading import Lock

import pytest
import torch

import offload
from offload.cache.depth import DepthChoice, Heat, hottest_first
from offload.compute.orders import most_integer_rows
from offload.ram.depth_rules import ByWeight
from offload.runtime.options import LoadOptions
from offload.store.reading import ReadingThreads, Ticket
from tests.quantised_checkpoints import logits_of, write_olmoe

TOKENS = torch.arange(24)[None] * 7 % 256
EXPERTS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder, with its packed copy in planes beside it."""
    folder = write_olmoe(tmp_path_factory.mktemp("levels") / "model", num_experts=EXPERTS, num_experts_per_tok=3)
    offload.quantise_in_levels(folder, folder.parent / "experts", form="planes")
    return folder


def loaded(model, **options):
    return offload.load(model, pack=model.parent / "experts", **options)


def test_the_hottest_experts_bits_come_first():
    heat = Heat(4)
    heat.note({0: 1, 1: 5, 2: 1})
    heat.note({2: 1})
    wanted = {0: [(0, 2), (1, 2)], 1: [(1, 1), (2, 1)], 2: [(0, 2), (1, 1)], 3: [(0, 7)]}
    assert hottest_first(wanted, heat) == [(3, 0), (2, 0), (0, 0), (0, 1), (1, 1), (1, 2), (2, 1)]
    assert heat.hottest() == [1, 2, 0]
    assert heat[1] == pytest.approx(5 * 0.98)


def test_heat_forgets_and_never_overflows():
    heat = Heat(2)
    heat.note({0: 3})
    for _ in range(5000):
        heat.note({1: 1})
    assert heat[1] == pytest.approx(1 / (1 - Heat.KEPT))
    assert heat.hottest()[0] == 1
    assert 0 <= heat[0] < 1e-20


def test_thresholds_of_the_routing_weight():
    rule = ByWeight(3, (0.6, 0.9))
    weight_TK = torch.tensor([[0.1, 0.5, 0.4], [0.05, 0.92, 0.03]])
    expert_TK = torch.tensor([[0, 1, 2], [3, 4, 5]])
    nothing, third = torch.zeros(6, dtype=torch.bool), torch.tensor([False, False, False, True, False, False])
    # before 0.1 come 0.9, before 0.4 comes 0.5; before 0.05 comes 0.92, which is more than 0.9
    assert rule.depths(weight_TK, expert_TK, weight_TK, nothing).tolist() == [[1, 3, 3], [0, 3, 0]]
    assert rule.depths(weight_TK, expert_TK, weight_TK, third).tolist() == [[1, 3, 3], [1, 3, 0]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("weight", DepthChoice("weight")),
        ("weight:0.5,1", DepthChoice("weight", thresholds=(0.5, 1.0))),
        ("hottest:3", DepthChoice("hottest", num_hot=3)),
        ("auto", None),
        ("2", None),
    ],
)
def test_names_of_rules(text, found):
    assert DepthChoice.named(text) == found


@pytest.mark.parametrize("text", ["weight:0.9,0.6", "weight:1", "hottest:0", "hottest:x", "router:2", "coldest", "-1"])
def test_refused_depths(text):
    with pytest.raises(ValueError, match="depth"):
        LoadOptions(path_or_id="model", depth=text)


def test_urgent_reads_come_first_among_those_that_nothing_needs():
    threads, order, landed = ReadingThreads(1), [], SimpleQueue()
    gate = Lock()
    gate.acquire()
    tickets = [Ticket(0, number, 0, 1, landed) for number in range(6)]
    threads.submit(tickets[0], [gate.acquire])
    given = [(1, 2.0), (2, 9.0), (3, 2.0), (4, 5.0)]
    for number, urgency in given:
        threads.submit(tickets[number], [lambda number=number: order.append(number)], is_demand=False, urgency=urgency)
    threads.submit(tickets[5], [lambda: order.append(5)])
    threads.promote(tickets[3])
    gate.release()
    for _ in tickets:
        landed.get(timeout=10)
    threads.close()
    assert order == [5, 3, 2, 4, 1]


def test_free_bits_are_sums_of_integers_and_close(model):
    """Of single tokens, whole and by routing weight, where experts of one call have planes or none."""
    exact, fast = (loaded(model, cache_experts=EXPERTS, arithmetic=level) for level in ("fixed", "fast"))
    shallow = loaded(model, cache_experts=EXPERTS, arithmetic="fast", depth="weight")
    for tokens in TOKENS[0, 1:5, None, None]:
        expected, found = logits_of(exact, tokens), logits_of(fast, tokens)
        assert (found - expected).norm() < 0.02 * expected.norm()
        assert logits_of(shallow, tokens).isfinite().all()
    if most_integer_rows():
        assert "integers" in fast.offload.report()["arithmetic"]["computed_by"].values()
    assert "integers" not in exact.offload.report()["arithmetic"]["computed_by"].values()


@pytest.mark.parametrize(
    ("cached", "io"), [(EXPERTS, "cached"), (3, "direct"), pytest.param(1, "cached", marks=pytest.mark.slow)]
)
def test_whole_reading_by_weight_is_the_copy_with_all_levels(model, cached, io):
    """With thresholds of 1 every expert is read whole: the bits of `depth="all"`, at every number of slots."""
    whole = loaded(model, cache_experts=EXPERTS)
    running = loaded(model, cache_experts=cached, depth="weight:1,1", io=io)
    for tokens in (TOKENS, *TOKENS[0, :5, None, None], TOKENS[:, 3:9]):
        assert torch.equal(logits_of(running, tokens), logits_of(whole, tokens))
    report = running.offload.report()["depth_rule"]
    assert report["is_lossy"]
    assert set(report["rows_by_depth"]) <= {0, 3}
    assert report["rows_by_depth"].get(0, 0) == 0


def test_a_miss_reads_the_first_level_and_upgrades_read_one_plane(model):
    running = loaded(model, cache_experts=EXPERTS, depth="hottest:2", io_threads=1)
    first = logits_of(running, TOKENS)
    assert torch.equal(first, logits_of(loaded(model, cache_experts=EXPERTS, depth=1), TOKENS))
    form = running.offload.runtime.layers[0].levels
    for _ in range(6):
        logits_of(running, TOKENS)
    report = running.offload.report()
    assert [layer["depths"] for layer in report["depth_rule"]["layers"]] == [{1: EXPERTS - 2, 3: 2}] * 2
    base, one, two = (end - begin for begin, end in zip((0, *form.level_ends), form.level_ends, strict=False))
    assert report["depth_rule"]["deepened"] == 8
    assert report["depth_rule"]["deepened_bytes"] == 4 * (one + two)
    assert report["bytes_read"] == 2 * EXPERTS * base + 4 * (one + two)
    for slots in running.offload.runtime.layers:
        hottest = slots.heat.hottest()[:2]
        packed = loaded(model, cache_experts=EXPERTS).offload.runtime
        packed.ahead.fill([range(EXPERTS)] * 2)
        for expert in hottest:
            whole = packed.layers[slots.layer][expert]["down_proj"]
            assert all(map(torch.equal, slots[expert]["down_proj"], whole))


def test_small_weights_are_computed_from_few_bits_or_not_at_all(model):
    running = loaded(model, cache_experts=EXPERTS, depth="weight:0.3,0.6")
    logits_of(running, TOKENS[:, :1])
    rows = running.offload.report()["depth_rule"]["rows_by_depth"]
    assert sum(rows.values()) == 2 * 3
    assert rows[3] >= 2
    assert rows.keys() & {0, 1}


def test_budgets_change_at_random_while_it_generates(model):
    running = loaded(model, cpu_memory="4GiB", depth="hottest")
    runtime, chosen = running.offload.runtime, random.Random(5)
    plan = running.offload.plan
    besides = plan.fixed_bytes - plan.slack_bytes
    base = sum(EXPERTS * slots.form.slot_bytes for slots in runtime.layers)
    seen = set()
    for _ in range(9):
        logits_of(running, TOKENS[:, chosen.randrange(20) :])
        room = chosen.randrange(base * 3 // 4, 3 * base)
        running.offload.resize(_budget(besides + room))
        assert running.offload.plan.slot_bytes <= running.offload.plan.room_bytes
        for slots in runtime.layers:
            found = slots.report()
            seen.add((found["slots"], *found["planes"]))
            assert sum(found["depths"].values()) <= found["slots"]
            for level, places in enumerate(found["planes"], start=2):
                assert sum(n for depth, n in found["depths"].items() if depth >= level) <= places
    assert len(seen) > 4
    assert any(slots < EXPERTS for slots, *_ in seen)
    running.offload.resize("4GiB")
    for _ in range(12):
        logits_of(running, TOKENS)
    assert [slots.report()["depths"] for slots in runtime.layers] == [{3: EXPERTS}] * 2
    assert torch.equal(logits_of(running, TOKENS), logits_of(loaded(model, cache_experts=EXPERTS), TOKENS))


def _budget(nbytes):
    """The budget that leaves no more than its slack besides `nbytes`."""
    limit = nbytes
    for _ in range(40):
        limit = nbytes + max(int(0.03 * limit), 96 << 20)
    return limit


def test_what_resize_refuses(model):
    with pytest.raises(ValueError, match="only a packed copy in levels"):
        loaded(model, cache_experts=2).offload.resize("4GiB")
    running = loaded(model, cpu_memory="4GiB", depth="weight")
    with pytest.raises(ValueError, match="take"):
        running.offload.resize("1MiB")
    logits_of(running, TOKENS)


def test_damaged_planes_are_refused(model, tmp_path):
    pack = tmp_path / "experts"
    data = bytearray((model.parent / "experts").read_bytes())
    index = json.loads((model.parent / "experts.json").read_text())
    for record in index["layers"][1]["records"]:
        data[record["offset"] + record["nbytes"] - 100] ^= 1
    pack.write_bytes(bytes(data))
    (tmp_path / "experts.json").write_text(json.dumps(index))
    for rule in ("weight:1,1", "hottest"):
        running = offload.load(model, pack=pack, cache_experts=EXPERTS, depth=rule)
        with pytest.raises(OSError, match="another checksum"):
            _run_often(running)


def test_an_exception_in_a_call_leaves_the_next_one_whole(model, monkeypatch):
    running = loaded(model, cache_experts=3, depth="weight:1,1")
    expected = logits_of(running, TOKENS)
    slots = running.offload.runtime.layers[1]
    monkeypatch.setattr(slots, "complete", lambda expert: (_ for _ in ()).throw(KeyboardInterrupt))
    running.offload.runtime.changes.begin()
    with pytest.raises(KeyboardInterrupt):
        logits_of(running, TOKENS)
    monkeypatch.undo()
    assert torch.equal(logits_of(running, TOKENS), expected)


def _run_often(running):
    for _ in range(20):
        logits_of(running, TOKENS)
