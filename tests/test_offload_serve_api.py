"""The OpenAI interface over HTTP: a tiny model, a real server, hand-made requests and the openai client."""

import contextlib
import json
import re
import threading
import time

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.served_model import Served, make_tokenizer, save_model
from tests.small_engine import SmallEngine

HI = [{"role": "user", "content": "Hi"}]
GREEDY = {"messages": HI, "temperature": 0, "max_tokens": 24}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("tiny"))).eval()


@pytest.fixture(scope="module")
def served(model):
    engine = SmallEngine(model, [257])
    with Served(engine, make_tokenizer()) as served:
        yield served
    engine.close()


@pytest.fixture
def post(served):
    def send(body, path="/v1/chat/completions", **more):
        return httpx.post(f"{served.url}{path}", json=body, timeout=60, **more)

    return send


@pytest.fixture(scope="module")
def client(served, openai):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events_of(text):
    """Bodies of the events of a stream, checked for their form."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    assert all(re.fullmatch(r"data: \{.*\}", block) for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def greedy(model, prompt, count, **options):
    """What the model generates greedily: ids."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


def test_a_chat_answer_is_what_the_model_generates(post, model):
    body = post(GREEDY).json()
    tokenizer = make_tokenizer()
    prompt = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
    tokens = greedy(model, prompt, 24)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    shown = [token for token in tokens if token not in (256, 257)]
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(shown)}
    assert choice["finish_reason"] == ("stop" if 257 in tokens else "length")
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["usage"]["completion_tokens"] == len(tokens)
    assert body["usage"]["total_tokens"] == len(prompt) + len(tokens)


def test_a_stream_has_its_parts_in_order_and_the_same_text(post):
    whole = post(GREEDY).json()
    answer = post({**GREEDY, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = events_of(answer.text)
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    *chunks, usage = events
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert [delta["delta"] for delta in deltas if "role" in delta["delta"]] == [deltas[0]["delta"]]
    assert deltas[-1]["delta"] == {}
    assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    text = "".join(delta["delta"].get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]


def test_without_wish_no_usage_is_streamed(post):
    assert all("usage" not in event for event in events_of(post({**GREEDY, "stream": True}).text))


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(post, is_stream):
    text = post(GREEDY).json()["choices"][0]["message"]["content"]
    stop = text[2:4]
    body = {**GREEDY, "stop": [stop, "never in it"], "stream": is_stream}
    answer = post(body)
    if is_stream:
        choices = [event["choices"][0] for event in events_of(answer.text)]
        said, reason = "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        said, reason = choice["message"]["content"], choice["finish_reason"]
    assert said == text[: text.index(stop)]
    assert reason == "stop"


def test_a_stop_string_saves_the_steps_after_it(served, post):
    text = post(GREEDY).json()["choices"][0]["message"]["content"]
    before = served.engine.steps
    answer = post({**GREEDY, "stop": text[0]}).json()
    assert answer["choices"][0]["message"]["content"] == ""
    assert served.engine.steps - before == answer["usage"]["completion_tokens"] < 4


def test_logprobs_are_those_of_the_model(post, model):
    body = post({**GREEDY, "logprobs": True, "top_logprobs": 3}).json()
    prompt = make_tokenizer().apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
    tokens = greedy(model, prompt, 24)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    entries = body["choices"][0]["logprobs"]["content"]
    places = [place for place, token in enumerate(tokens) if token not in (256, 257)]
    assert len(entries) == len(places)
    for place, entry in zip(places, entries, strict=True):
        assert entry["logprob"] == pytest.approx(float(logits[place, tokens[place]]), abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(
            logits[place].topk(3).values.tolist(), abs=1e-4
        )
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data.decode("utf-8", errors="replace") == body["choices"][0]["message"]["content"]


def test_streamed_logprobs_are_the_same(post):
    body = {**GREEDY, "logprobs": True, "top_logprobs": 1}
    whole = post(body).json()["choices"][0]["logprobs"]["content"]
    chunks = [event["choices"][0]["logprobs"] for event in events_of(post({**body, "stream": True}).text)]
    assert [entry for chunk in chunks if chunk for entry in chunk["content"]] == whole


def test_seeds_and_several_answers(post):
    body = {"messages": HI, "temperature": 1.0, "max_tokens": 12, "seed": 7, "n": 2}
    first, second = post(body).json()["choices"], post(body).json()["choices"]
    assert first == second
    assert [choice["index"] for choice in first] == [0, 1]
    assert first[0]["message"] != first[1]["message"]
    events = events_of(post({**body, "stream": True}).text)
    for index in (0, 1):
        deltas = [e["choices"][0]["delta"] for e in events if e["choices"][0]["index"] == index]
        assert "".join(d.get("content", "") for d in deltas) == first[index]["message"]["content"]


def test_a_bias_forbids_a_token(post):
    first = post({**GREEDY, "max_tokens": 1, "logprobs": True}).json()["choices"][0]["logprobs"]["content"][0]
    token = make_tokenizer().encode(first["token"])[0]
    other = post({**GREEDY, "max_tokens": 1, "logprobs": True, "logit_bias": {str(token): -100}}).json()
    assert other["choices"][0]["logprobs"]["content"][0]["token"] != first["token"]


def test_an_answer_that_is_begun_is_continued(post, model):
    begun = [*HI, {"role": "assistant", "content": "Well, "}]
    text = post({**GREEDY, "messages": begun}).json()["choices"][0]["message"]["content"]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,"
    raw = post({"prompt": prompt, "temperature": 0, "max_tokens": 24}, "/v1/completions").json()["choices"][0]["text"]
    spaced = post({"prompt": prompt + " ", "temperature": 0, "max_tokens": 24}, "/v1/completions").json()
    assert text in (raw, spaced["choices"][0]["text"])


def test_an_answer_that_is_begun_is_answered_where_the_request_says_so(post):
    begun = [*HI, {"role": "assistant", "content": "Hel"}]
    sizes = [
        post({**GREEDY, "messages": begun, **change}).json()["usage"]["prompt_tokens"]
        for change in ({}, {"add_generation_prompt": True}, {"continue_final_message": False})
    ]
    assert sizes[0] < sizes[1] == sizes[2]


def test_whole_numbers_may_be_written_with_a_point_and_a_seed_of_minus_one_is_none(post):
    body = {**GREEDY, "temperature": 1, "max_tokens": 16.0, "seed": -1}
    answers = {json.dumps(post(body).json()["choices"]) for _ in range(3)}
    assert len(answers) > 1
    assert json.dumps(post({**body, "seed": 7.0}).json()["choices"]) == json.dumps(
        post({**body, "seed": 7}).json()["choices"]
    )


def test_every_response_is_described(served):
    described = httpx.get(f"{served.url}/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert {"200", "4XX", "5XX"} == set(operation["responses"]), (path, method)
    asked = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert asked["max_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert (asked["temperature"]["minimum"], asked["temperature"]["maximum"]) == (0, 100)
    streams = described["paths"]["/v1/messages"]["post"]["responses"]
    assert "text/event-stream" in streams["200"]["content"]
    assert streams["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("AnthropicError")


def test_reasoning_has_a_channel_of_its_own(post, model):
    body = {**GREEDY, "max_tokens": 80, "chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {"257": -100}}
    whole = post(body).json()
    message = whole["choices"][0]["message"]
    prompt = make_tokenizer().apply_chat_template(
        HI, add_generation_prompt=True, enable_thinking=True, return_dict=False
    )
    text = make_tokenizer().decode(greedy(model, prompt, 80, suppress_tokens=[257]))
    thought, closed, said = text.partition("</think>")
    assert message["reasoning_content"] == thought.replace("<|im_start|>", "").strip()
    assert message["content"] == said.replace("<|im_start|>", "").lstrip() or not closed
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    deltas = [event["choices"][0]["delta"] for event in events_of(post({**body, "stream": True}).text)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_a_call_and_is_streamed_as_one(post, choice):
    body = {"messages": HI, "tools": [WEATHER], "tool_choice": choice, "seed": 3, "max_tokens": 300}
    whole = post(body).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    call = whole["message"]["tool_calls"][0]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["city"] in ("Oslo", "Rome")
    assert arguments["days"] <= 9
    choices = [event["choices"][0] for event in events_of(post({**body, "stream": True}).text)]
    parts = [part for c in choices for part in c["delta"].get("tool_calls", [])]
    assert parts[0]["function"] == {"name": "weather", "arguments": ""}
    assert parts[0]["index"] == 0
    assert parts[1]["function"]["arguments"] == call["function"]["arguments"]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off_is_no_call(post):
    body = {"messages": HI, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 8, "temperature": 0}
    choice = post(body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_in_json_matches_its_schema(post, seed):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "list": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}},
        "required": ["ok", "list"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    body = {"messages": HI, "response_format": form, "seed": seed, "max_tokens": 300}
    choice = post(body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    found = json.loads(choice["message"]["content"])
    assert isinstance(found["ok"], bool)
    assert set(found["list"]) <= {1, 2}
    assert found.keys() == {"ok", "list"}


def test_json_after_reasoning(post):
    body = {
        "messages": HI,
        "chat_template_kwargs": {"enable_thinking": True},
        "response_format": {"type": "json_object"},
        "logit_bias": {"259": 30},
        "seed": 1,
        "max_tokens": 300,
    }
    message = post(body).json()["choices"][0]["message"]
    assert isinstance(json.loads(message["content"]), dict)


def test_completions_of_texts_and_ids(post, model):
    body = {"prompt": "ab", "max_tokens": 6, "temperature": 0}
    one = post(body, "/v1/completions").json()
    assert one["object"] == "text_completion"
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("ab")
    tokens = greedy(model, ids, 6)
    assert one["choices"][0]["text"] == tokenizer.decode([t for t in tokens if t not in (256, 257)])
    by_ids = post({**body, "prompt": ids}, "/v1/completions").json()
    assert by_ids["choices"] == one["choices"]
    several = post({**body, "prompt": ["ab", "xyz"], "echo": True}, "/v1/completions").json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
    assert several["choices"][0]["text"] == "ab" + one["choices"][0]["text"]
    assert several["usage"]["prompt_tokens"] == 5
    assert post({**body, "prompt": [ids, ids]}, "/v1/completions").json()["usage"]["prompt_tokens"] == 4


def test_completions_stream_what_they_answer(post):
    body = {"prompt": ["ab", "xyz"], "max_tokens": 6, "temperature": 0, "logprobs": 1, "echo": True}
    whole = post(body, "/v1/completions").json()["choices"]
    events = events_of(post({**body, "stream": True}, "/v1/completions").text)
    for index in (0, 1):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole[index]["text"]
        tokens = [token for choice in mine if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
        assert tokens == whole[index]["logprobs"]["tokens"]
        assert mine[-1]["finish_reason"] == whole[index]["finish_reason"]
        offsets = [offset for choice in mine if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
        assert offsets[0] == len(("ab", "xyz")[index])


def test_models_are_listed_with_and_without_v1(served):
    listed = httpx.get(f"{served.url}/v1/models").json()
    assert listed == httpx.get(f"{served.url}/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["tiny", "gpt-4o"]
    assert listed["data"][0]["max_model_len"] == 512
    assert httpx.get(f"{served.url}/v1/models/tiny").json() == listed["data"][0]
    missing = httpx.get(f"{served.url}/v1/models/other/name")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "boss"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text"),
        ({"temperature": "hot"}, "temperature", "hot"),
        ({"temperature": -1}, "temperature", "0 to 100"),
        ({"temperature": 1e308}, "temperature", "0 to 100"),
        ({"top_p": 7}, "top_p", "got 7"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"n": 99}, "n", "less than or equal to 4"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": "x" * 257}, "stop", "256"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs to true"),
        ({"logit_bias": {"262": 1}}, "logit_bias", "262"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt", "together"),
        ({"tools": [WEATHER] * 129}, "tools", "128"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "none"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [WEATHER]},
            "tool_choice",
            "weather",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"modalities": ["audio"]}, "modalities", "text only"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"seed": "x"}, "seed", "integer"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
    ],
)
def test_a_wrong_field_is_named(served, change, param, words):
    body = json.dumps({**GREEDY, **change})
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "")
    assert words in error["message"]


@pytest.mark.parametrize("schema", [{"type": "objct"}, {"type": "string", "pattern": "("}, {"$ref": "http://x/y"}])
def test_a_schema_that_cannot_be_used_is_refused(post, schema):
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = post({**GREEDY, "response_format": form})
    assert answer.status_code == 400
    assert "json_schema cannot be" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", '"x"', "", "\x00", '{"messages": [{"role": "user", "content": "x"}], ']
)
def test_what_is_no_json_object_is_refused(served, text):
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=text)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_numbers_that_are_none_are_refused(served):
    for number in ("NaN", "Infinity", "1e999"):
        text = f'{{"messages": [{{"role": "user", "content": "x"}}], "temperature": {number}}}'
        assert httpx.post(f"{served.url}/v1/chat/completions", content=text).status_code == 400
    deep = '{"messages": ' + "[" * 100_000
    assert httpx.post(f"{served.url}/v1/chat/completions", content=deep).status_code == 400


def test_unknown_fields_and_null_are_passed_over(post):
    extra = {"user": "me", "metadata": {"a": 1}, "keep_alive": "5m", "top_p": None, "stop": None, "tools": None}
    assert post({**GREEDY, **extra}).json()["choices"] == post(GREEDY).json()["choices"]


def test_a_prompt_without_room_is_refused_and_a_long_wish_is_cut(post):
    full = post({**GREEDY, "messages": [{"role": "user", "content": "x" * 600}]})
    assert full.status_code == 400
    assert full.json()["error"]["code"] == "context_length_exceeded"
    cut = post({**GREEDY, "max_tokens": 10**6, "logit_bias": {"257": -100}}).json()
    assert cut["usage"]["total_tokens"] == 512
    assert cut["choices"][0]["finish_reason"] == "length"


def test_other_models_other_paths_other_methods(post, served):
    missing = post({**GREEDY, "model": "gpt-5"})
    assert missing.status_code == 404
    assert missing.json()["error"] == {
        "message": "The model 'gpt-5' does not exist; there is tiny, gpt-4o",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert post({**GREEDY, "model": "gpt-4o"}).json()["model"] == "gpt-4o"
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{served.url}/v1/chat/completions").status_code == 405


def test_the_openai_client_gets_objects_and_exceptions(client, openai):
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    streamed = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HI, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="none", messages=HI)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices[0].text is not None
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-4o"]


def test_metrics_are_in_prometheus_form_and_grow(served, post):
    from prometheus_client.parser import text_string_to_metric_families

    def read():
        text = httpx.get(f"{served.url}/metrics").text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = read()
    usage = post(GREEDY).json()["usage"]
    after = read()
    label = (("model_name", "tiny"),)
    grown = {name: after[name, label] - before[name, label] for name in ("expertier:prompt_tokens_total",)}
    assert grown == {"expertier:prompt_tokens_total": usage["prompt_tokens"]}
    tokens = "expertier:generation_tokens_total", label
    assert after[tokens] - before[tokens] == usage["completion_tokens"]
    gaps = "expertier:inter_token_latency_seconds_count", label
    assert after[gaps] - before[gaps] >= usage["completion_tokens"] - 1
    assert all(after[name] >= value for name, value in before.items() if name[0].endswith(("_total", "_count")))
    post({**GREEDY, "max_tokens": -1})


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def leave_early(url, body, is_time):
    """Ask, and hang up as soon as it is time, or after 0.4 s without a word."""
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(timeout=0.4) as client,
        client.stream("POST", url, json=body) as answer,
    ):
        for _ in answer.iter_lines():
            if is_time():
                return


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_stops_the_model(model, is_stream):
    engine = SmallEngine(model, step_s=0.02)
    with Served(engine, make_tokenizer()) as served:
        body = {**GREEDY, "max_tokens": 400, "ignore_eos": True, "stream": is_stream}
        leave_early(f"{served.url}/v1/chat/completions", body, lambda: engine.steps > 5)
        wait_for(lambda: engine.active == 0)
        assert engine.steps < 60
        assert not served.service.running


def test_a_full_queue_is_said_at_once_and_the_openai_client_waits_and_succeeds(model, openai):
    engine = SmallEngine(model, most_queued=1, step_s=0.03)
    with Served(engine, make_tokenizer()) as served:
        body = {**GREEDY, "max_tokens": 30, "ignore_eos": True}
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(post_to(served, body)), daemon=True) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(30)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "2"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=2) as client:
            busy = [threading.Thread(target=post_to, args=(served, body), daemon=True) for _ in range(2)]
            for thread in busy:
                thread.start()
                time.sleep(0.1)
            assert client.chat.completions.create(model="tiny", messages=HI, max_tokens=2).choices
        assert (
            'requests_refused_total{model_name="tiny",reason="rate_limit_exceeded"}'
            in httpx.get(f"{served.url}/metrics").text
        )


def post_to(served, body):
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)


def test_an_engine_that_fails_says_so_to_this_request_only(model, monkeypatch):
    engine = SmallEngine(model)
    with Served(engine, make_tokenizer()) as served:
        good = post_to(served, GREEDY)
        monkeypatch.setattr(engine, "model", None)
        failed = post_to(served, GREEDY)
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        lines = post_to(served, {**GREEDY, "stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "server_error"
        assert lines[-1] == "data: [DONE]"
        monkeypatch.undo()
        assert post_to(served, GREEDY).json()["choices"] == good.json()["choices"]


def test_running_answers_end_after_the_signal_and_new_ones_are_refused(model):
    engine = SmallEngine(model, step_s=0.03)
    with Served(engine, make_tokenizer()) as served:
        answers = []
        body = {**GREEDY, "max_tokens": 30, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(post_to(served, body)))
        with httpx.Client() as kept:
            kept.get(f"{served.url}/health")
            thread.start()
            wait_for(lambda: engine.steps > 2)
            served.lifetime.stop()
            health = kept.get(f"{served.url}/health")
        thread.join(20)
        assert health.status_code == 503
        assert health.json()["status"] == "shutting down"
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 30


def test_an_answer_that_outlasts_the_grace_is_cut_off_with_a_word(model):
    engine = SmallEngine(model, step_s=0.05)
    with Served(engine, make_tokenizer()) as served:
        served.lifetime._grace_s = 0.3
        body = {**GREEDY, "max_tokens": 400, "ignore_eos": True, "stream": True}
        texts = []
        thread = threading.Thread(target=lambda: texts.append(post_to(served, body).text))
        thread.start()
        wait_for(lambda: engine.steps > 2)
        served.lifetime.stop()
        thread.join(20)
    lines = texts[0].strip().split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "cancelled"
    assert lines[-1] == "data: [DONE]"
