"""The simulated device: two clocks, and experts behind a wire that computes as in memory."""

import pytest
import torch

from offload.gpu import simulated
from offload.gpu.devices import open_lane


@pytest.fixture
def lane(monkeypatch):
    """A lane whose processor takes exactly the seconds that a test says."""
    clock = [100.0]
    monkeypatch.setattr(simulated.time, "perf_counter", lambda: clock[0])
    opened = open_lane("simulated", "auto", None)
    opened.compute = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    return opened


def pairs(nbytes):
    return [(torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8))]


def test_a_copy_takes_its_bytes_over_the_rate_and_only_the_rest_is_waited_for(lane, monkeypatch):
    monkeypatch.setattr(simulated, "WIRE_BYTES_PER_S", 100.0)
    first = lane.copy_in(pairs(300), None)  # 0 to 3 s
    second = lane.copy_in(pairs(200), None)  # 3 to 5 s: one wire
    assert (first.seconds, second.seconds) == (3.0, 2.0)
    lane.compute(2.0)
    assert not first.is_done
    lane.compute_after(first)
    assert lane.stall_s == pytest.approx(1.0)
    assert first.is_done
    lane.compute(4.0)  # until 7 s
    lane.compute_after(second)
    assert lane.stall_s == pytest.approx(1.0)


def test_a_copy_begins_when_what_it_waits_for_has_been_reached(lane, monkeypatch):
    monkeypatch.setattr(simulated, "WIRE_BYTES_PER_S", 100.0)
    lane.compute(6.0)
    mark = lane.mark()
    copy = lane.copy_in(pairs(100), mark)
    lane.compute_after(copy)
    assert lane.stall_s == pytest.approx(1.0)
    assert lane.now_s() == pytest.approx(107.0)
    target, source = pairs(8)[0]
    lane.copy_in([(target, source)], None)
    assert torch.equal(target, source), "what is queued is done at once"


def test_what_has_no_rate_has_no_device_of_size_nothing():
    with pytest.raises(ValueError, match='device="simulated" with gpu_memory=0'):
        open_lane("simulated", 0, None)


@pytest.mark.slow
def test_the_benchmark_of_pregated_models_counts_what_is_copied_ahead(tmp_path):
    """Of an ordinary model nothing is; of a pre-gated one only the first layers, whose gates are their own, miss."""
    from experiments.bench.systems.pregated import ROUTERS, decoded, save_model

    for name in ("ordinary", "2 ahead"):
        folder = str(tmp_path / name)
        save_model(folder, ROUTERS[name], layers=4, experts=8, width=64)
        whole, _ = decoded(folder, 8, 8, is_ahead=name != "ordinary", steps=8)
        logits, found = decoded(folder, 4, 8, is_ahead=name != "ordinary", steps=8)
        assert torch.equal(logits, whole)
        assert 0 <= found["stall_share"] < 1
        assert (found["copied_ahead"] > 0) == (name == "2 ahead")
        assert found["hit_rate"] >= (0.5 if name == "2 ahead" else 0)
        assert found["wire_s"] > 0
