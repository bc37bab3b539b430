"""Random submits and cancels against a model of the pool: every stream ends once, and nothing stays taken."""

import random
import time

import pytest
import torch

from offload.engine.events import Finished, QueueFull
from offload.engine.options import EngineOptions
from offload.engine.request import Sampling
from tests.served import ask, collect, serve, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("fuzz"), torch.bfloat16)


class PoolModel:
    """What must hold at every moment, from outside: limits, and books that agree with what is open."""

    def __init__(self, users, queued):
        self.users, self.queued = users, queued
        self.open = []

    def check(self, counters):
        assert counters.running <= self.users
        assert counters.kv_reserved + counters.kv_kept <= counters.kv_capacity
        assert counters.kv_in_use <= counters.kv_reserved
        assert counters.running + counters.queued <= self.users + self.queued


def wait_until_idle(engine):
    for _ in range(600):
        counters = engine.counters()
        if not counters.running and not counters.queued:
            return counters
        time.sleep(0.05)
    raise AssertionError(counters)


@pytest.mark.parametrize(("seed", "schedule"), [(1, "turns"), (2, "together"), (3, "turns"), (4, "together")])
def test_random_submits_and_cancels_leave_nothing_behind(folder, seed, schedule):
    chance = random.Random(seed)
    options = EngineOptions(most_users=3, most_queued=5, schedule=schedule, reuse="any", piece_tokens=16)
    model = PoolModel(3, 5)
    streams, refused = [], 0
    with serve(folder, options=options) as engine:
        for _ in range(120):
            action = chance.random()
            if action < 0.5:
                length = chance.choice((1, 2, 15, 16, 17, 40, 100))
                first = chance.randrange(2, 6)
                prompt = [first, *[(first * place) % 90 + 2 for place in range(1, length)]]
                sampling = Sampling(temperature=chance.choice((0.0, 1.0)), seed=chance.randrange(100))
                try:
                    request = ask(prompt, chance.randrange(1, 20), sampling=sampling, owner=str(first % 2))
                    streams.append(engine.submit(request))
                except QueueFull:
                    refused += 1
            elif streams:
                chance.choice(streams).cancel()
            if chance.random() < 0.1:
                time.sleep(0.02)
            model.check(engine.counters())
        counters = wait_until_idle(engine)
        assert counters.kv_reserved == counters.kv_in_use == 0
        assert counters.refused_total == refused
        assert sum(counters.finished_total.values()) == len(streams)
        for stream in streams:
            tokens, finished = collect(stream)
            assert isinstance(finished, Finished)
            assert finished.reason in ("stop", "length", "cancelled")
            assert [event.index for event in tokens] == list(range(len(tokens)))
        assert engine.state == "ready"


@pytest.mark.slow
def test_a_thousand_cancels_leave_the_memory_as_it_was(folder):
    from offload.memory.budget import resident_bytes

    with serve(folder, options=EngineOptions(most_users=4, reuse="any")) as engine:
        seen = []
        for number in range(1000):
            stream = engine.submit(ask([2 + number % 90] * 60, 100, ignore_end=True))
            if number % 2:
                stream.next(30)
            stream.cancel()
            collect(stream)
            if number % 100 == 99:
                seen.append(resident_bytes())
        counters = wait_until_idle(engine)
        assert counters.kv_reserved == counters.kv_in_use == 0
        assert counters.finished_total["cancelled"] == 1000
        assert seen[-1] <= 1.01 * seen[2]


def test_a_failing_request_leaves_the_bits_of_the_others_as_they_were(folder):
    class Broken:
        def __init__(self, after):
            self.left = after

        def allowed_V(self):
            self.left -= 1
            if self.left < 0:
                raise MemoryError("the grammar grew too large")
            return torch.ones(97, dtype=torch.bool).numpy()

        def accept(self, token_id):
            pass

    sampling = Sampling(top_logprobs=5)
    good = ask(range(2, 30), 20, ignore_end=True, sampling=sampling)
    with serve(folder) as engine:
        expected = collect(engine.submit(good))[0]
    with serve(folder) as engine:
        broken = [
            engine.submit(ask([5, 6, 7 + after], 20, ignore_end=True, constraint=Broken(after))) for after in (0, 3, 7)
        ]
        stream = engine.submit(good)
        assert collect(stream)[0] == expected
        messages = {collect(one)[1].message for one in broken}
        assert messages == {"MemoryError: the grammar grew too large"}
