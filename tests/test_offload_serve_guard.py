"""Who may ask: keys, hosts, origins, sizes; how the server starts and what it says while it loads."""

import contextlib
import socket
import threading
import time

import httpx
import pytest
from starlette.datastructures import Headers
from transformers import AutoModelForCausalLM

from offload.serve.web import guard
from offload.serve.web.guard import Gate, as_origins, expect_safe, read_keys
from offload.serve.web.lifetime import listen
from offload.serve.wire.errors import ApiError
from tests.served_model import Served, make_tokenizer, save_model
from tests.small_engine import SmallEngine

ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
KEYS = ("secret-1", "secret-2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("tiny"))).eval()


@pytest.fixture(scope="module")
def locked(model):
    """A server with keys, for one web page."""
    with Served(
        SmallEngine(model, [257]), make_tokenizer(), Gate(keys=KEYS, origins=("http://page.example",))
    ) as served:
        yield served


def ask(served, **headers):
    return httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers=headers, timeout=30)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer secret-1"},
        {"authorization": "bearer secret-2"},
        {"x-api-key": "secret-2"},
        {"api-key": "secret-1"},
    ],
)
def test_a_key_opens(locked, headers):
    assert ask(locked, **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer secret-"},
        {"Authorization": "Bearer secret-11"},
        {"Authorization": "Basic secret-1"},
    ],
)
def test_without_the_key_nothing_is_answered(locked, headers):
    refused = ask(locked, **headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "authentication_error"
    for path in ("/metrics", "/v1/models", "/openapi.json", "/version", "/status"):
        assert httpx.get(locked.url + path, headers=headers).status_code == 401
    assert httpx.get(f"{locked.url}/health", headers=headers).status_code == 200


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    Gate(keys=("a", "b", "c")).check("/v1/models", Headers({"x-api-key": "a"}))
    assert [pair[0] for pair in compared] == [b"a", b"b", b"c"]


def test_both_clients_raise_their_exceptions(locked, openai, anthropic):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    other = anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=0)
    with other, pytest.raises(anthropic.AuthenticationError):
        other.messages.create(model="tiny", max_tokens=1, messages=ASK["messages"])


def test_owners_are_told_apart_without_showing_the_key():
    gate = Gate(keys=KEYS)
    names = [gate.owner(Headers({"x-api-key": key})) for key in KEYS]
    assert len(set(names)) == 2
    assert not any(key in name for key in KEYS for name in names)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "", "a]b"])
def test_a_foreign_host_name_is_refused_without_a_key(host):
    with pytest.raises(ApiError, match="Host name"):
        Gate().check("/v1/models", Headers({"host": host}))


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:80", "192.168.1.5:8080", "mine.lan"])
def test_this_machine_is_answered(host):
    Gate(hosts=("mine.lan",)).check("/v1/models", Headers({"host": host}))


def test_web_pages_need_to_be_named():
    own, page = {"host": "localhost:8080"}, {"origin": "http://page.example"}
    with pytest.raises(ApiError, match="web page"):
        Gate().check("/v1/models", Headers({**own, **page}))
    Gate().check("/v1/models", Headers({**own, "origin": "http://localhost:8080"}))
    Gate(origins=("http://page.example",)).check("/v1/models", Headers({**own, **page}))


def test_cors_is_for_named_origins_without_credentials(locked):
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{locked.url}/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    assert "access-control-allow-credentials" not in allowed.headers
    other = httpx.options(f"{locked.url}/v1/chat/completions", headers={**asked, "Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert as_origins(["http://a.example/"]) == ("http://a.example",)
    for wrong in ("*", "a.example", "http://a.example/path", "ftp://x", "http://*"):
        with pytest.raises(ValueError, match="--cors"):
            as_origins([wrong])


def test_a_large_body_is_refused(locked):
    headers = {"x-api-key": KEYS[0]}
    large = b'{"messages": "' + b"x" * guard.LARGEST_BODY + b'"}'
    refused = httpx.post(f"{locked.url}/v1/chat/completions", content=large, headers=headers)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "request_too_large"

    def pieces():
        for _ in range(guard.LARGEST_BODY // 65536 + 2):
            yield b"x" * 65536

    with contextlib.suppress(httpx.WriteError):  # the connection is closed while the client still writes
        assert httpx.post(f"{locked.url}/v1/messages", content=pieces(), headers=headers).status_code == 413


def test_headers_without_end_are_refused(locked):
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for _ in range(200):
                connection.sendall(b"X-A: " + b"y" * 1000 + b"\r\n")
            answer = connection.recv(100)
        except ConnectionError:
            answer = b""
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert httpx.get(f"{locked.url}/health").status_code == 200


def test_a_body_that_does_not_come_ends_the_wait(locked, monkeypatch):
    monkeypatch.setattr(guard, "SLOWEST_BODY_S", 0.2)
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEYS[0]}\r\nContent-Length: 9\r\n\r\n{{"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("text", "words"), [("", "got 0"), ("# none\n\n", "got 0"), ("a b\n", "key 1"), ("ok\nschlüssel\n", "key 2")]
)
def test_key_files_are_checked(tmp_path, text, words):
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_keys(file)


def test_key_files_are_read(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second \n")
    assert read_keys(file) == ("first", "second")
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_the_network_needs_a_key():
    expect_safe("127.0.0.1", Gate(), is_insecure=False)
    expect_safe("0.0.0.0", Gate(keys=KEYS), is_insecure=False)
    expect_safe("0.0.0.0", Gate(), is_insecure=True)
    with pytest.raises(ValueError, match="--api-key-file"):
        expect_safe("0.0.0.0", Gate(), is_insecure=False)


def test_a_port_in_use_is_said():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}: .*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"cannot listen at no\.such\.host"):
        listen("no.such.host.invalid", 0)


def test_while_it_loads_the_server_says_so(model):
    served = Served(SmallEngine(model), make_tokenizer())
    loaded = threading.Event()
    ready, served.load = served.load, lambda: loaded.wait(20) and ready()
    served.thread = threading.Thread(
        target=lambda: served.lifetime.run_with(served._listening, served.load), daemon=True
    )
    served.thread.start()
    health = httpx.get(f"{served.url}/health", timeout=20)
    assert health.status_code == 503
    assert health.json()["status"] == "loading"
    early = ask(served)
    assert early.status_code == 503
    assert early.headers["retry-after"] == "5"
    assert early.json()["error"]["code"] == "loading"
    busy = httpx.post(f"{served.url}/v1/messages", json={**ASK, "model": "tiny"}, timeout=30)
    assert (busy.status_code, busy.headers["retry-after"]) == (529, "5")
    assert busy.json()["error"]["type"] == "overloaded_error"
    assert httpx.head(f"{served.url}/health").status_code == 503
    loaded.set()
    deadline = time.monotonic() + 10
    while httpx.get(f"{served.url}/health").status_code != 200:
        assert time.monotonic() < deadline
    assert ask(served).status_code == 200
    served.__exit__()


def test_a_model_that_cannot_be_loaded_ends_the_server(model):
    served = Served(SmallEngine(model), make_tokenizer())

    def fail():
        raise ValueError("the model is damaged")

    with pytest.raises(ValueError, match="damaged"):
        served.lifetime.run_with(served._listening, fail)
    served._listening.close()
