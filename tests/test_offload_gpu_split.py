"""Which misses go over the wire and which are computed on the CPU, against all assignments."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.gpu.split import PROBE_EVERY, Rate, Splitter, split

SECONDS = st.floats(0.01, 100, allow_nan=False)


@given(wire_s=SECONDS, cpu_s=st.lists(SECONDS, max_size=8))
def test_no_assignment_is_done_earlier(wire_s, cpu_s):
    def done(on_cpu):
        return max(wire_s * (len(cpu_s) - len(on_cpu)), sum(cpu_s[place] for place in on_cpu))

    places = range(len(cpu_s))
    every = itertools.chain.from_iterable(itertools.combinations(places, count) for count in range(len(cpu_s) + 1))
    found = split(wire_s, cpu_s)
    assert len(set(found)) == len(found)
    assert done(found) == pytest.approx(min(map(done, every)))


def test_by_hand():
    assert split(1.0, [3.0, 1.0, 2.0]) == [1]
    assert split(1.0, [1.0]) == []
    assert split(5.0, [1.0, 1.0, 1.0]) == [0, 1, 2]
    assert split(1.0, []) == []


def test_old_measurements_fade():
    rate = Rate(7.0)
    assert (rate.per_s, rate.is_measured) == (7.0, False)
    rate.note(100, 1.0)
    assert rate.per_s == pytest.approx(100)
    for _ in range(200):
        rate.note(10, 1.0)
    assert rate.per_s == pytest.approx(10, rel=0.01)


@given(wire=st.floats(1e9, 60e9), cpu=st.floats(1e9, 100e9), count=st.integers(2, 10))
def test_wrong_guesses_are_corrected_while_it_runs(wire, cpu, count):
    splitter, size = Splitter(wire_bytes_per_s=wire / 50, cpu_bytes_per_s=cpu * 50), 10_000_000
    for _ in range(3 * PROBE_EVERY):
        on_cpu = splitter.choose(size, [1] * count)
        for place in range(count):
            if place in on_cpu:
                splitter.note_cpu(size, 1, size / cpu)
            else:
                splitter.wire.note(size, size / wire)
    ideal = split(size / wire, [size / cpu] * count)
    assert len(splitter.choose(size, [1] * count)) in {len(ideal), len(ideal) + 1, len(ideal) - 1}


def test_more_rows_take_longer_until_they_are_measured():
    splitter = Splitter(cpu_bytes_per_s=100.0)
    splitter.note_cpu(100, 1, 2.0)
    assert splitter.cpu_seconds(100, 1) == pytest.approx(2)
    assert splitter.cpu_seconds(100, 4) == pytest.approx(8)
    splitter.note_cpu(100, 5, 3.0)
    assert splitter.cpu_seconds(100, 4) == pytest.approx(3)
    assert splitter.choose(100, []) == []
