"""Exceptions at any moment: whatever happened, the next call gives the resident model's bits, soon."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.ram.slots import LayerSlots
from offload.store import reading, store
from offload.store.reading import ReadingThreads, Ticket

IDS = torch.tensor([[7, 3, 11, 5, 2]])
SOON_S = 5.0


class Stop(BaseException):
    """What a timer, a notebook's stop button or a user's hook may raise."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder, and the resident model's logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": None, "pad_token_id": 0}
    config = OlmoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2, initializer_range=0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    with torch.no_grad():
        return folder, AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(IDS, use_cache=False).logits


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def interrupted(model, after_s):
    """One call with an alarm; whether it was cut short."""

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        logits(model)
    except Stop:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def random_interrupts(checkpoint, count, slots):
    folder, expected = checkpoint
    model, chance, cut = offload.load(folder, cache_experts=slots, io="cached"), random.Random(slots), 0
    for _ in range(count):
        cut += interrupted(model, chance.uniform(1e-4, 8e-3))
        started = time.perf_counter()
        assert torch.equal(logits(model), expected)
        assert time.perf_counter() - started < SOON_S
    model.offload.close()
    return cut


@pytest.mark.parametrize("slots", [1, 5, 16])
def test_random_interrupts(checkpoint, slots):
    assert random_interrupts(checkpoint, 12, slots) > 0


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 5, 16])
def test_three_hundred_random_interrupts_under_load(checkpoint, slots):
    # other processes: threads of this one would hold the interpreter itself, and every call would take seconds
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        assert random_interrupts(checkpoint, 100, slots) > 10
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("place", ["_start", "_take_slot", "release", "settle_ahead"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_before_or_after_any_change_of_the_slots(checkpoint, monkeypatch, place, when):
    folder, expected = checkpoint
    whole, armed, read = getattr(LayerSlots, place), [1], store.read_into

    def broken(self, *arguments, **options):
        if armed and when == "before":
            armed.pop()
            raise Stop
        result = whole(self, *arguments, **options)
        if armed:
            armed.pop()
            raise Stop
        return result

    def slow(*arguments):
        time.sleep(0.01)
        return read(*arguments)

    monkeypatch.setattr(LayerSlots, place, broken)
    monkeypatch.setattr(store, "read_into", slow)
    model = offload.load(folder, cache_experts=3, io="cached")
    with pytest.raises(Stop):
        logits(model)
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_an_exception_out_of_a_hook_between_layers(checkpoint):
    folder, expected = checkpoint
    model = offload.load(folder, cache_experts=2)

    def fail(*_):
        raise MemoryError("no room for a hook")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected)


def test_a_trace_leaves_out_a_call_that_was_cut_short(checkpoint):
    folder, _ = checkpoint
    model = offload.load(folder, cache_experts=2, record_trace=True)
    logits(model)

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        logits(model)
    handle.remove()
    logits(model)
    trace = model.offload.trace()
    assert trace.num_tokens == 2 * IDS.shape[1]
    assert (trace.expert_TLK >= 0).all()


def test_a_read_that_never_ends_is_an_error_that_says_what_it_waited_for(checkpoint, monkeypatch):
    folder, expected = checkpoint
    model = offload.load(folder, cache_experts=4, io="cached")
    gate, read = threading.Event(), store.read_into
    monkeypatch.setattr(reading, "WAIT_S", 0.2)
    monkeypatch.setattr(store, "read_into", lambda *arguments: gate.wait(30) and read(*arguments))
    with pytest.raises(TimeoutError, match=r"experts \[.*\] of MoE layer 0 was not read within 0 s"):
        logits(model)
    with pytest.raises(TimeoutError, match="reads did not end"):
        logits(model)
    gate.set()
    monkeypatch.setattr(reading, "WAIT_S", 30.0)
    assert torch.equal(logits(model), expected)


def test_quiet_threads_write_nothing():
    threads, landed, gate, ran = ReadingThreads(1), SimpleQueue(), threading.Event(), []
    begun = threading.Event()
    threads.submit(Ticket(0, 0, 0, 1, landed), [lambda: begun.set() or gate.wait(30)])
    assert begun.wait(30)
    threads.submit(Ticket(0, 1, 0, 1, landed), [lambda: ran.append(1)])
    threading.Timer(0.1, gate.set).start()
    started = time.perf_counter()
    threads.quiesce()
    assert time.perf_counter() - started > 0.05
    assert not ran
    threads.submit(ticket := Ticket(0, 2, 0, 1, landed), [lambda: ran.append(2)])
    ticket.wait()
    assert ran == [2]
    threads.close()


def test_a_forked_child_computes_and_its_parent_goes_on(checkpoint):
    folder, expected = checkpoint
    model = offload.load(folder, cache_experts=2)
    assert torch.equal(logits(model), expected)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork either
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(logits(model), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(logits(model), expected)
