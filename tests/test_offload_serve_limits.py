"""Time limits, clients that leave or do not read, and prefixes on a disk that fails: others are served as before."""

import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from transformers import AutoModelForCausalLM

from offload.engine.kept.prefix_file import SUFFIX, PrefixLabel, read_prefix
from offload.engine.options import EngineOptions
from offload.serve.web import service, sse
from tests import served as engines
from tests.served_model import Served, make_tokenizer, save_model
from tests.small_engine import SmallEngine

HI = [{"role": "user", "content": "Hi"}]
LONG = {"messages": HI, "temperature": 0, "max_tokens": 900, "ignore_eos": True}
PLACES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def served(folder):
    """The real engine with two places behind the real server."""
    options = EngineOptions(most_users=PLACES, most_queued=64, reuse="any")
    with (
        engines.serve(folder, options=options, context=4096, cache_experts=2) as engine,
        Served(engine, make_tokenizer(), context=1000) as served,
    ):
        yield served


def post(served, body, path="/v1/chat/completions"):
    return httpx.post(f"{served.url}{path}", json=body, timeout=60)


def wait_until_idle(engine, seconds=30.0):
    deadline = time.monotonic() + seconds
    while (now := engine.counters()).running or now.queued:
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    return engine.counters()


def endings(served):
    """How many answers ended in which way, as `/metrics` says."""
    text = httpx.get(f"{served.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("expertier:request_success_total")]
    return {line.split('"')[1]: float(line.rsplit(maxsplit=1)[1]) for line in lines}


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_ends_at_its_time_limit_with_what_there_is(model, is_stream):
    engine = SmallEngine(model, step_s=0.05)
    with Served(engine, make_tokenizer()) as served:
        answer = post(served, {**LONG, "max_tokens": 400, "timeout": 0.3, "stream": is_stream})
        assert answer.status_code == 200
        if is_stream:
            last = json.loads(answer.text.strip().split("\n\n")[-2].removeprefix("data: "))
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            body = answer.json()
            assert body["choices"][0]["finish_reason"] == "length"
            assert 0 < body["usage"]["completion_tokens"] < 400
        assert endings(served) == {"timeout": 1.0}
        message = post(served, {"messages": HI, "max_tokens": 400, "timeout": 0.3}, "/v1/messages").json()
        assert message["stop_reason"] in ("max_tokens", "end_turn")


def test_without_a_token_in_time_the_answer_is_an_error_that_is_not_asked_again(served, openai):
    engine = served.engine
    busy = [engine.submit(engines.ask([place, 3], 990, ignore_end=True)) for place in range(PLACES)]
    with (
        Served(engine, make_tokenizer(), time_limit_s=0.05) as limited,
        openai.OpenAI(base_url=f"{limited.url}/v1", api_key="none", max_retries=3) as client,
    ):
        refused = post(limited, LONG)
        assert refused.status_code == 504
        assert refused.headers["x-should-retry"] == "false"
        assert refused.json()["error"]["code"] == "timeout"
        with pytest.raises(openai.InternalServerError, match=r"within 0\.05 s"):
            client.chat.completions.create(model="tiny", messages=HI)
        assert endings(limited) == {"timeout": 2.0}
        assert post(limited, {**LONG, "stream": True}).text.endswith('"code":"timeout"}}\n\ndata: [DONE]\n\n')
    for stream in busy:
        stream.cancel()
    wait_until_idle(engine)


@pytest.mark.parametrize("seconds", [0, -1, 1e9, "5"])
def test_a_time_limit_that_is_none_is_refused(served, seconds):
    assert post(served, {**LONG, "timeout": seconds}).json()["error"]["param"] == "timeout"


@pytest.mark.slow
def test_the_time_limit_holds_in_the_queue(served):
    with ThreadPoolExecutor(PLACES) as users:
        running = [users.submit(post, served, {**LONG, "max_tokens": 150}) for _ in range(PLACES)]
        while served.engine.counters().running < PLACES:
            time.sleep(0.002)
        waiting = post(served, {**LONG, "timeout": 0.02})
        assert waiting.status_code == 504
        assert served.engine.counters().queued == 0
        assert all(one.result().json()["usage"]["completion_tokens"] == 150 for one in running)


def leave(url, number):
    """Ask and hang up: a stream after its first words, a plain request after a moment; many still wait then."""
    body = {**LONG, "messages": [{"role": "user", "content": f"{number} " * 30}], "stream": number % 2 == 0}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=0.05 + number % 5 / 50) as answer,
    ):
        next(answer.iter_lines())


@pytest.mark.parametrize("count", [8, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_leave_give_all_places_back(served, count):
    before = wait_until_idle(served.engine)
    with ThreadPoolExecutor(8) as users:
        list(users.map(lambda number: leave(served.url, number), range(count)))
    now = wait_until_idle(served.engine)
    assert now.kv_in_use == now.kv_reserved == 0
    # on a busy machine some have left before the server saw their request
    assert 0 < now.finished_total["cancelled"] - before.finished_total.get("cancelled", 0) <= count
    assert not served.service.running
    assert post(served, {**LONG, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3


def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody(served, monkeypatch):
    monkeypatch.setattr(sse, "SLOW_READER_S", 0.5)
    before = wait_until_idle(served.engine)
    served._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps({**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(served._listening.getsockname())
        lazy.sendall(head + body)
        while not served.engine.counters().running:
            time.sleep(0.002)
        assert post(served, {**LONG, "max_tokens": 5}).json()["usage"]["completion_tokens"] == 5
        wait_until_idle(served.engine)
        deadline = time.monotonic() + 20
        while served.service.running:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lazy.settimeout(20)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := lazy.recv(65536):
                received += piece
    assert b"[DONE]" not in received
    assert served.engine.counters().kv_in_use == 0
    assert served.engine.counters().finished_total["length"] > before.finished_total.get("length", 0)


def test_demands_that_cannot_be_met_are_the_clients_fault(served):
    def refusal(**change):
        refused = post(served, {**LONG, **change})
        assert refused.status_code == 400
        return refused.json()["error"]["message"]

    def form(schema):
        return {"type": "json_schema", "json_schema": {"schema": schema}}

    properties = {str(number): {"type": "string"} for number in range(2000)}
    wide = {"type": "object", "properties": properties}
    assert "json_schema cannot be used" in refusal(response_format=form({"$ref": "#"}))
    assert "the grammar of the answer failed" in refusal(response_format=form(wide))
    assert "no token is allowed" in refusal(logit_bias={str(token): -100 for token in range(262)})


@pytest.mark.slow
def test_timings_and_progress_in_the_words_of_llama_server(served, monkeypatch):
    body = {**LONG, "max_tokens": 8, "timings_per_token": True}
    timings = post(served, body).json()["timings"]
    assert timings["predicted_n"] == 8
    assert timings["cache_n"] + timings["prompt_n"] > 20
    assert timings["predicted_per_second"] == pytest.approx(8000 / timings["predicted_ms"])
    assert 0 <= timings["offload"]["hit_rate"] <= 1
    assert timings["offload"]["bytes_read"] >= 0
    assert "timings" not in post(served, {**LONG, "max_tokens": 8}).json()
    monkeypatch.setattr(service, "PROGRESS_S", 0.01)
    with ThreadPoolExecutor(PLACES) as users:
        running = [users.submit(post, served, {**LONG, "max_tokens": 60}) for _ in range(PLACES)]
        while served.engine.counters().running < PLACES:
            time.sleep(0.002)
        text = post(served, {**body, "stream": True, "return_progress": True}).text
        assert all(one.result().status_code == 200 for one in running)
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]
    seen = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert seen
    assert all(0 <= one["cache"] <= one["processed"] <= one["total"] == seen[0]["total"] for one in seen)
    assert events[-1]["timings"]["predicted_n"] == 8


def test_a_full_disk_fails_no_request_and_leaves_no_half_file(folder, tmp_path, logged):
    options = EngineOptions(reuse="any", prefix_folder=tmp_path / "kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    prompt = [5, *range(10, 200)]
    with engines.serve(folder, options=options, cache_experts=2) as engine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
        try:
            first = engines.collect(engine.submit(engines.ask(prompt, 4, ignore_end=True)))[1]
            again = engines.collect(engine.submit(engines.ask([*prompt[:150], 7, 8], 4, ignore_end=True)))[1]
            engine._loop.admission._folder.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (first.reason, again.reason) == ("length", "length")
        assert again.usage.cached_tokens == 150
    assert list((tmp_path / "kept").iterdir()) == []
    assert sum("could not be kept on disk" in record.getMessage() for record in logged) >= 1


WRITE_FOR_EVER = """
import sys, torch
from pathlib import Path
from offload.engine.kept.prefix_file import IDS, PrefixLabel, write_prefix
label = PrefixLabel(model="m", owner="o", num_canonical=0)
number = 0
while True:
    number += 1
    keys = torch.full((1, 2, 512, 64), float(number))
    ids = torch.arange(512, dtype=torch.int32)
    write_prefix(Path(sys.argv[1]), label, {IDS: ids, "0.keys": keys, "0.values": keys})
    print(number, flush=True)
"""


@pytest.mark.slow
def test_prefixes_are_whole_or_absent_after_kill_9(tmp_path):
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(5):
            writer.stdout.readline()
        time.sleep(0.013)
        writer.kill()
        writer.wait()
        writer.stdout.close()
    files = list(tmp_path.glob(f"*{SUFFIX}"))
    assert len(files) >= 5
    for file in files:
        label, tensors = read_prefix(file)
        assert label == PrefixLabel(model="m", owner="o", num_canonical=0)
        assert bool((tensors["0.keys"] == tensors["0.values"]).all())
        assert file.stat().st_mode & 0o077 == 0
