"""The interfaces of Anthropic's messages and OpenAI's responses over HTTP, with their clients and by hand."""

import json

import httpx
import pytest
from transformers import AutoModelForCausalLM

from tests.served_model import Served, make_tokenizer, save_model
from tests.small_engine import SmallEngine

HI = [{"role": "user", "content": "Hi"}]
GREEDY = {"model": "tiny", "messages": HI, "max_tokens": 24, "temperature": 0}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "input_schema": CITY}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("tiny"))).eval()
    with Served(SmallEngine(model, [257]), make_tokenizer()) as served:
        yield served


@pytest.fixture
def post(served):
    def send(path, body):
        return httpx.post(f"{served.url}{path}", json=body, timeout=60)

    return send


@pytest.fixture(scope="module")
def claude(served, anthropic):
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(served, openai):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def named_events(text):
    """Names and bodies of a stream's events."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    return found


def text_of(post, messages=HI, **more):
    """The same conversation by chat completions."""
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, **more}
    return post("/v1/chat/completions", body).json()["choices"][0]["message"]


def test_a_message_is_the_answer_of_chat_completions(post):
    body = post("/v1/messages", GREEDY).json()
    assert body["type"] == "message"
    assert body["role"] == "assistant"
    assert body["content"] == [{"type": "text", "text": text_of(post)["content"]}]
    assert body["stop_reason"] in ("max_tokens", "end_turn")
    assert body["stop_sequence"] is None
    counted = post("/v1/messages/count_tokens", {"model": "tiny", "messages": HI}).json()
    assert counted == {"input_tokens": body["usage"]["input_tokens"]}


def test_events_of_a_message_come_in_order(post):
    whole = post("/v1/messages", GREEDY).json()
    events = named_events(post("/v1/messages", {**GREEDY, "stream": True}).text)
    names = [event["type"] for event in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert events[0]["message"]["content"] == []
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]


def test_a_stop_sequence_is_named(post):
    text = text_of(post)["content"]
    body = post("/v1/messages", {**GREEDY, "stop_sequences": ["never in it", text[1:3]]}).json()
    assert body["stop_reason"] == "stop_sequence"
    assert body["stop_sequence"] == text[1:3]
    assert body["content"] == [{"type": "text", "text": text[: text.index(text[1:3])]}]


def test_system_tools_and_results_are_brought_to_the_template(post):
    billing = "x-anthropic-billing-header: cc_version=1; cch=abc12;\nBe brief."
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]},
    ]
    system = [{"type": "text", "text": billing, "cache_control": {"type": "ephemeral"}}]
    answer = post("/v1/messages", {**GREEDY, "messages": turns, "system": system, "tools": [TOOL]})
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    same = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call | {"id": "toolu_1"}]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"},
    ]
    function = {"name": "weather", "description": "", "parameters": CITY}
    expected = text_of(post, same, tools=[{"type": "function", "function": function}])
    assert answer.json()["content"][0]["text"] == expected["content"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_forced_tool_is_used(claude, is_stream):
    asked = {**GREEDY, "max_tokens": 200, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}
    if is_stream:
        temperature = asked.pop("temperature")
        with claude.messages.stream(**asked, extra_body={"temperature": temperature}) as stream:
            message = stream.get_final_message()
    else:
        temperature = asked.pop("temperature")
        message = claude.messages.create(**asked, extra_body={"temperature": temperature})
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.name == "weather"
    assert block.input["city"] in ("Oslo", "Rome")
    assert message.stop_reason == "tool_use"


def test_thinking_is_a_block_of_its_own(post):
    body = {**GREEDY, "max_tokens": 90, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    del body["temperature"]
    expected = text_of(post, max_tokens=90, chat_template_kwargs={"enable_thinking": True})
    whole = post("/v1/messages", {**body, "temperature": 0}).json()
    assert whole["content"][0]["type"] == "thinking"
    assert whole["content"][0]["thinking"] == expected["reasoning_content"]
    events = named_events(post("/v1/messages", {**body, "temperature": 0, "stream": True}).text)
    thought = "".join(event["delta"].get("thinking", "") for event in events if event["type"] == "content_block_delta")
    assert thought == expected["reasoning_content"]
    kinds = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert kinds == [block["type"] for block in whole["content"]]


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error"),
        ({"temperature": 2}, 400, "invalid_request_error"),
        ({"model": "claude"}, 404, "not_found_error"),
        ({"tool_choice": {"type": "tool", "name": "none"}, "tools": [TOOL]}, 400, "invalid_request_error"),
    ],
)
def test_errors_are_anthropics(post, change, status, kind):
    answer = post("/v1/messages", {**GREEDY, **change})
    assert answer.status_code == status
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == kind
    assert answer.json()["error"]["message"]


def test_the_anthropic_client_gets_objects_and_exceptions(claude, post, anthropic):
    message = claude.messages.create(
        model="tiny", max_tokens=24, messages=HI, system="Be brief.", extra_body={"temperature": 0}
    )
    expected = text_of(post, [{"role": "system", "content": "Be brief."}, *HI])
    assert message.content[0].text == expected["content"]
    with claude.messages.stream(
        model="tiny", max_tokens=24, messages=HI, system="Be brief.", extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream) == expected["content"]
    assert claude.messages.count_tokens(model="tiny", messages=HI).input_tokens > 3
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="none", max_tokens=1, messages=HI)


def test_a_response_is_the_answer_of_chat_completions(post, client):
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 24, "temperature": 0}
    whole = post("/v1/responses", body).json()
    assert whole["object"] == "response"
    assert whole["status"] in ("completed", "incomplete")
    (item,) = whole["output"]
    assert item["content"][0]["text"] == text_of(post)["content"]
    assert client.responses.create(**body).output_text == text_of(post)["content"]


def test_events_of_a_response_come_in_order(post):
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 24, "temperature": 0}
    whole = post("/v1/responses", body).json()
    events = named_events(post("/v1/responses", {**body, "stream": True}).text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", whole["status"]]
    assert set(names[4:-4]) == {"output_text.delta"}
    text = "".join(event["delta"] for event in events[4:-4])
    assert text == events[-4]["text"] == whole["output"][0]["content"][0]["text"]
    last = events[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"] == whole["usage"]


def test_the_openai_client_follows_the_events_of_a_response(client, post):
    with client.responses.stream(model="tiny", input="Hi", max_output_tokens=24, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == text_of(post)["content"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_forced_call_in_a_response(post, is_stream):
    tool = {"type": "function", "name": "weather", "parameters": CITY}
    body = {
        "model": "tiny",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [tool, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "weather"},
        "temperature": 0,
        "max_output_tokens": 200,
    }
    if is_stream:
        events = named_events(post("/v1/responses", {**body, "stream": True}).text)
        names = [event["type"].removeprefix("response.") for event in events]
        assert names == [
            "created",
            "in_progress",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]
        item = events[-1]["response"]["output"][0]
    else:
        (item,) = post("/v1/responses", body).json()["output"]
    assert item["type"] == "function_call"
    assert json.loads(item["arguments"])["city"] in ("Oslo", "Rome")


def test_earlier_calls_and_results_of_a_response_are_shown(post):
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "summary": [], "content": []},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    body = {"model": "tiny", "input": items, "instructions": "Be brief.", "max_output_tokens": 24, "temperature": 0}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    same = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    whole = post("/v1/responses", body).json()
    assert whole["output"][0]["content"][0]["text"] == text_of(post, same)["content"]


def test_a_response_in_json(post):
    body = {"input": "Hi", "max_output_tokens": 300, "temperature": 0}
    form = {"format": {"type": "json_schema", "name": "x", "schema": CITY}}
    whole = post("/v1/responses", {**body, "text": form}).json()
    assert json.loads(whole["output"][0]["content"][0]["text"])["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
    ],
)
def test_what_needs_storage_is_refused(post, change, param):
    answer = post("/v1/responses", {"input": "Hi", **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_engine_that_fails_is_said_in_each_dialect(served, post, monkeypatch):
    monkeypatch.setattr(served.engine, "model", None)
    assert post("/v1/messages", GREEDY).json()["error"]["type"] == "api_error"
    last = named_events(post("/v1/messages", {**GREEDY, "stream": True}).text)[-1]
    assert last["type"] == "error"
    last = named_events(post("/v1/responses", {"input": "Hi", "stream": True}).text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
