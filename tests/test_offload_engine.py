"""The engine: each request has the answer that it would have alone, and nobody harms another."""

import threading
import weakref

import numpy as np
import pytest
import torch

import offload
from offload.engine.engine import Engine
from offload.engine.events import NotReady, QueueFull
from offload.engine.options import EngineOptions
from offload.engine.request import Sampling
from tests.served import VOCABULARY, ask, collect, ids_of, prompts, serve, write_model

LOGPROBS = Sampling(top_logprobs=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"), torch.bfloat16)


@pytest.fixture(scope="module")
def engine(folder):
    with serve(folder) as engine:
        yield engine


def alone(folder, requests, **options):
    """The tokens of each request on an engine of its own."""
    answers = []
    for request in requests:
        with serve(folder, **options) as engine:
            answers.append(collect(engine.submit(request))[0])
    return answers


def test_greedy_answers_are_those_of_generate(folder, engine):
    model = offload.load(folder, cache_experts=4, context=256)
    for prompt in prompts(4):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        tokens, finished = collect(engine.submit(ask(prompt)))
        assert ids_of(tokens) == expected.tolist()
        assert finished.reason == ("stop" if expected[-1] == 1 else "length")
        assert finished.usage.prompt_tokens == len(prompt)
        assert finished.usage.completion_tokens == len(tokens)
    model.offload.close()


def test_several_users_in_turns_have_the_bits_that_each_has_alone(folder, engine):
    requests = [ask(prompt, 10, sampling=LOGPROBS, ignore_end=True) for prompt in prompts(4, seed=2)]
    expected = alone(folder, requests)
    streams = [engine.submit(request) for request in requests]
    for stream, tokens in zip(streams, expected, strict=True):
        assert collect(stream)[0] == tokens


def test_a_seed_gives_the_same_text_beside_others_and_another_seed_another(folder, engine):
    def sampled(seed):
        return ask([5, 6, 7], 16, sampling=Sampling(temperature=1.0, top_p=0.95, seed=seed), ignore_end=True)

    first = ids_of(collect(engine.submit(sampled(7)))[0])
    streams = [engine.submit(sampled(seed)) for seed in (3, 7, 4)]
    answers = [ids_of(collect(stream)[0]) for stream in streams]
    assert answers[1] == first
    assert answers[0] != first != answers[2]


def test_end_tokens_stop_ids_and_stop_checks_end_an_answer(engine):
    tokens, _ = collect(engine.submit(ask([9, 8, 7], 20, ignore_end=True)))
    ids = ids_of(tokens)
    place = next(place for place in range(1, 20) if ids[place] not in ids[:place])
    for options in ({"stop_ids": frozenset([ids[place]])}, {"is_stop": lambda token_id: token_id == ids[place]}):
        found, finished = collect(engine.submit(ask([9, 8, 7], 20, ignore_end=True, **options)))
        assert ids_of(found) == ids[: place + 1]
        assert finished.reason == "stop"


def test_a_callback_gets_all_events_in_order(engine):
    events, done = [], threading.Event()
    stream = engine.submit(ask([4, 5, 6], 8, ignore_end=True))

    def read(event):
        events.append(event)
        if stream.finished is not None:
            done.set()

    stream.subscribe(read)
    assert done.wait(30)
    assert [event.index for event in events[:-1]] == list(range(8))
    assert events[-1].reason == "length"


def test_a_reader_that_raises_ends_its_own_request_only(engine):
    def leave(event):
        if event.index == 5:
            raise RuntimeError("its loop is closed")

    other = engine.submit(ask([4, 5, 6], 30, ignore_end=True))
    stream = engine.submit(ask([7, 5, 6], 200, ignore_end=True))
    stream.subscribe(leave)
    assert collect(other)[1].reason == "length"
    assert collect(stream)[1].reason == "cancelled"
    assert stream.finished.usage.completion_tokens < 200


class Grammar:
    """Allows the ids of a list, one after the other, then nothing."""

    def __init__(self, ids):
        self.ids, self.accepted = list(ids), []

    def allowed_V(self):
        allowed = np.zeros(VOCABULARY + 3, bool)
        allowed[self.ids[: len(self.accepted) + 1][len(self.accepted) :]] = True
        return allowed

    def accept(self, token_id):
        self.accepted.append(token_id)


def test_a_constraint_decides_and_one_that_allows_nothing_fails_its_own_request(engine):
    other = engine.submit(ask([4, 5, 6], 30, ignore_end=True))
    grammar = Grammar([11, 22, 33])
    tokens, finished = collect(engine.submit(ask([4, 5, 9], 8, constraint=grammar)))
    assert ids_of(tokens) == grammar.accepted == [11, 22, 33]
    assert finished.reason == "invalid"
    assert finished.message.startswith("no token is allowed here")
    assert collect(other)[1].reason == "length"


def test_a_stop_check_that_raises_fails_its_own_request(engine):
    def broken(token_id):
        raise KeyError("no such token")

    other = engine.submit(ask([4, 5, 6], 20, ignore_end=True))
    finished = collect(engine.submit(ask([4, 5, 9], 8, is_stop=broken)))[1]
    assert finished.reason == "error"
    assert "KeyError" in finished.message
    assert collect(other)[1].reason == "length"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([5] * 250, 20), "may have 257 in all"),
        (ask([VOCABULARY], 2), "token 97 does not exist"),
        (ask([5], 2, sampling=Sampling(logit_bias={200: 1.0})), "token 200 does not exist"),
    ],
)
def test_what_can_never_be_answered_is_refused(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)


class Gate:
    """Holds the model at its first layer until it is opened."""

    def __init__(self):
        self.open, self.reached, self.calls = threading.Event(), threading.Event(), 0

    def attach(self, model):
        model.model.layers[1].register_forward_pre_hook(self.hold)

    def hold(self, module, args):
        self.calls += 1
        self.reached.set()
        assert self.open.wait(60)


def test_sixty_four_requests_on_four_places_and_a_queue_of_sixteen(folder):
    gate = Gate()
    with serve(folder, options=EngineOptions(most_users=4, most_queued=16), prepare=gate.attach) as engine:
        streams, refused = [], []
        for number in range(64):
            try:
                streams.append(engine.submit(ask([5, 6, 7 + number % 20], 4)))
            except QueueFull as error:
                refused.append(error.retry_after_s)
        assert len(refused) == 44
        assert all(1 <= seconds <= 120 for seconds in refused)
        assert engine.counters().refused_total == 44
        assert engine.counters().queued + engine.counters().running == 20
        gate.open.set()
        assert {collect(stream)[1].reason for stream in streams} <= {"length", "stop"}


def test_a_cancelled_request_stops_in_the_queue_in_its_prefill_and_while_it_decodes(folder):
    gate = Gate()
    with serve(folder, options=EngineOptions(most_users=1), prepare=gate.attach) as engine:
        reading = engine.submit(ask([5] * 100, 50))
        queued = engine.submit(ask([6] * 10, 50))
        assert gate.reached.wait(30)
        assert queued.position().state == "queued"
        assert queued.position().ahead == 0
        queued.cancel()
        assert collect(queued)[1].reason == "cancelled"
        assert reading.position().state == "prefill"
        reading.cancel()
        gate.open.set()
        tokens, finished = collect(reading)
        assert not tokens
        assert finished.reason == "cancelled"
        assert gate.calls == 1  # the model was left before its next layer's experts
        decoding = engine.submit(ask([7] * 10, 200, ignore_end=True))
        decoding.next(30)
        decoding.cancel()
        decoding.cancel()
        assert collect(decoding)[1].reason == "cancelled"
        counters = engine.counters()
        assert counters.finished_total == {"cancelled": 3}
        assert counters.kv_reserved == counters.kv_in_use == counters.running == counters.queued == 0


def test_a_cancel_after_the_end_changes_nothing(engine):
    stream = engine.submit(ask([5, 6], 2, ignore_end=True))
    assert collect(stream)[1].reason == "length"
    stream.cancel()
    with pytest.raises(StopIteration):
        next(stream)


def test_an_expert_that_cannot_be_read_fails_the_requests_of_its_step_and_the_engine_lives(tmp_path):
    folder = write_model(tmp_path, torch.bfloat16)
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    with serve(folder, cache_experts=2, io="cached") as engine:
        expected = ids_of(collect(engine.submit(ask([5, 6, 7], 6)))[0])
        with file.open("r+b") as handle:
            handle.truncate(2000)
        finished = collect(engine.submit(ask(list(range(2, 60)), 6)))[1]
        assert finished.reason == "error"
        assert "\n" not in finished.message
        assert "expert" in finished.message
        with file.open("r+b") as handle:
            handle.write(whole)
        assert ids_of(collect(engine.submit(ask([5, 6, 7], 6)))[0]) == expected
        assert engine.state == "ready"


def test_an_engine_that_is_loading_closing_or_failed_says_so(folder):
    may_load = threading.Event()

    def load():
        may_load.wait(60)
        return offload.load(folder, cache_experts=2)

    engine = Engine(load)
    with pytest.raises(NotReady, match="loading"):
        engine.submit(ask([5], 2))
    with pytest.raises(TimeoutError):
        engine.wait_ready(0.01)
    may_load.set()
    engine.wait_ready(60)
    engine.close()
    assert engine.state == "closed"
    with pytest.raises(NotReady, match="closed"):
        engine.submit(ask([5], 2))

    def fail():
        raise ValueError("no such model")

    broken = Engine(fail)
    with pytest.raises(ValueError, match="no such model"):
        broken.wait_ready(60)
    with pytest.raises(NotReady, match="no such model"):
        broken.submit(ask([5], 2))
    assert broken.state == "failed"
    broken.close()


def test_closing_lets_running_requests_finish_and_cancels_the_queue(folder):
    engine = serve(folder, options=EngineOptions(most_users=1))
    running = engine.submit(ask([5, 6], 20, ignore_end=True))
    running.next(30)
    queued = engine.submit(ask([5, 6], 20))
    engine.close()
    assert collect(queued)[1].message == "the server is shutting down"
    assert collect(running)[1].reason == "length"


def test_a_closed_engine_keeps_its_counts_but_not_the_model(folder):
    models = []
    engine = serve(folder, prepare=lambda model: models.append(weakref.ref(model)))
    stream = engine.submit(ask([5, 6], 4, ignore_end=True))
    assert collect(stream)[1].reason == "length"
    misses = engine.counters().misses_L
    engine.close()
    assert models[0]() is None
    assert engine.counters().misses_L == misses
    assert sum(misses) > 0


def test_closing_cancels_what_runs_longer_than_the_grace(folder):
    engine = serve(folder, context=4000)
    stream = engine.submit(ask([5, 6], 400, ignore_end=True))
    stream.next(30)
    engine.close(grace_s=0.05)
    assert collect(stream)[1].reason == "cancelled"


def test_a_model_that_records_its_routing_is_refused(folder):
    engine = Engine(lambda: offload.load(folder, cache_experts=2, record_trace=True))
    with pytest.raises(ValueError, match="record_trace"):
        engine.wait_ready(60)
