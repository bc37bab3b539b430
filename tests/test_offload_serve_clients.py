"""What clients send, replayed word for word: Claude Code, Codex, Open WebUI, Continue, aider and llm."""

import json

import httpx
import pytest

from offload.engine.options import EngineOptions
from tests import served as engines
from tests.served_model import Served, make_tokenizer, save_model

CONTEXT, MOST = 3000, 160
COUNTED = ("model", "system", "tools", "messages", "thinking")
RULES = "You are an agent. Read files before you change them. " * 8


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The real engine, which keeps prefixes, behind the real server."""
    folder = save_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)
    options = EngineOptions(reuse="any", most_new_tokens=MOST)
    with (
        engines.serve(folder, options=options, context=12000, cache_experts=4) as engine,
        Served(engine, make_tokenizer(), context=CONTEXT, max_output=MOST) as served,
    ):
        yield served


@pytest.fixture
def send(served):
    def send(path, body, **headers):
        answer = httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer

    return send


def bodies(answer):
    """The JSON of a stream's events."""
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def agent_turn(number, messages):
    """A request of Claude Code: a billing line that changes, system blocks, tools, fields for Anthropic's servers."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.7; cc_entrypoint=cli; cch={number:05x};"
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"file_path": {"type": "string"}, "limit": {"type": "number", "exclusiveMinimum": 0}},
        "required": ["file_path"],
        "additionalProperties": False,
    }
    return {
        "model": "tiny",
        "max_tokens": 32000,
        "temperature": 1,
        "system": [
            {"type": "text", "text": billing},
            {"type": "text", "text": RULES, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ],
        "tools": [{"name": "Read", "description": "Reads a file.", "input_schema": schema}],
        "thinking": {"type": "disabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "user_0_account__session_0"},
        "output_config": {"effort": "medium"},
        "stream": True,
        "messages": messages,
    }


def test_claude_code_reads_only_what_is_new_although_its_first_line_changes(send):
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-app": "cli",
        "authorization": "Bearer none",
        "x-stainless-timeout": "600",
    }
    reminder = {"type": "text", "text": "<system-reminder>Today is Monday.</system-reminder>"}
    question = {"type": "text", "text": "What is in a.py?", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [reminder, question]}]
    first = agent_turn(1, messages)
    counted = send("/v1/messages/count_tokens?beta=true", {name: first[name] for name in COUNTED}, **headers).json()
    events = bodies(send("/v1/messages?beta=true", first, **headers))
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    assert events[0]["message"]["usage"]["input_tokens"] == counted["input_tokens"]
    call = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "a.py"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "print(1)"}]}
    later = [
        *messages,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "I look.", "signature": ""}, call]},
        {
            "role": "user",
            "content": [result, {"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "system", "content": "The user has opened a.py."},
    ]
    usage = bodies(send("/v1/messages?beta=true", agent_turn(2, later), **headers))[-2]["usage"]
    assert usage["cache_read_input_tokens"] >= counted["input_tokens"] - len("<|im_start|>assistant\n")
    assert 0 < usage["input_tokens"] < 250


def test_codex_brings_its_whole_conversation_and_tools_of_openais_servers(send):
    function = {
        "type": "function",
        "name": "shell",
        "description": "Runs a command.",
        "strict": False,
        "parameters": {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}},
    }
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    body = {
        "model": "tiny",
        "max_output_tokens": 40,
        "instructions": RULES,
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions/>"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
        ],
        "tools": [function, {"type": "custom", "name": "apply_patch", "format": grammar}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-session",
        "text": {"verbosity": "low"},
    }
    events = bodies(send("/v1/responses", body, accept="text/event-stream", originator="codex_cli_rs"))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    usage = events[-1]["response"]["usage"]
    thought = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None}
    call = {"type": "function_call", "name": "shell", "arguments": '{"command":["ls"]}', "call_id": "call_1"}
    more = [*events[-1]["response"]["output"], thought, call]
    more.append({"type": "function_call_output", "call_id": "call_1", "output": '{"output":"a.py","metadata":{}}'})
    again = bodies(send("/v1/responses", {**body, "input": [*body["input"], *more]}))[-1]["response"]["usage"]
    assert again["input_tokens_details"]["cached_tokens"] >= usage["input_tokens"] - len("<|im_start|>assistant\n")


@pytest.mark.slow
def test_open_webui_passes_its_own_fields_and_its_tasks_do_not_cost_the_conversation_its_prefix(served, send):
    name = httpx.get(f"{served.url}/v1/models", headers={"Authorization": "Bearer"}).json()["data"][0]["id"]
    body = {
        "model": name,
        "stream": True,
        "stream_options": {"include_usage": True},
        "repeat_penalty": 1.1,
        "num_ctx": 2048,
        "mirostat": 0,
        "keep_alive": "5m",
        "think": True,
        "logit_bias": {},
        "stop": [],
        "custom_param": {"a": [1]},
        "messages": [{"role": "user", "content": "Tell me of the sea and of the land behind it. " * 4}],
    }
    chunks = bodies(send("/v1/chat/completions", body))
    assert chunks[-1]["choices"] == []
    read = chunks[-1]["usage"]["prompt_tokens"]
    answer = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    for task in ("Create a concise title.", "Generate 1-3 broad tags.", "Suggest 3 follow-up questions."):
        asked = [{"role": "user", "content": f"### Task:\n{task}\n### Chat History:\n{answer}"}]
        body_of_task = {
            "model": name,
            "messages": asked,
            "stream": False,
            "max_tokens": 20,
            "max_completion_tokens": 20,
        }
        assert send("/v1/chat/completions", body_of_task).json()["choices"][0]["message"]["role"] == "assistant"
    turns = [*body["messages"], {"role": "assistant", "content": answer}, {"role": "user", "content": "More."}]
    usage = bodies(send("/v1/chat/completions", {**body, "messages": turns}))[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= read - len("<|im_start|>assistant\n")


def test_continue_completes_code_with_two_keys_and_many_stop_strings(send):
    body = {
        "model": "tiny",
        "prompt": "<fim_prefix>def f():\n<fim_suffix>\nprint(f())<fim_middle>",
        "max_tokens": 24,
        "temperature": 0.01,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "stream": True,
        "stop": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>", "\n\n", "\r\n\r\n", "/src/", "```"],
        "raw": True,
        "keep_alive": 1800,
    }
    both = {"authorization": "Bearer none", "api-key": "none"}
    chunks = bodies(send("/v1/completions", body, **both))
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert all(chunk["object"] == "text_completion" for chunk in chunks)


@pytest.mark.slow
def test_aider_streams_with_its_history_and_forces_functions(send):
    messages = [
        {"role": "system", "content": RULES},
        {"role": "user", "content": "I want you to act as a developer."},
        {"role": "assistant", "content": "Ok."},
        {"role": "user", "content": "Hi"},
    ]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "stream": True}
    assert bodies(send("/v1/chat/completions", body))[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    parameters = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    function = {"name": "write_file", "parameters": {**parameters, "additionalProperties": False}}
    forced = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "write_file"}},
    }
    (choice,) = send("/v1/chat/completions", {**body, **forced, "stream": False}).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "write_file"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["ok"] in (True, False)


def test_llm_asks_for_usage_and_for_schemas(send):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    body = {"model": "tiny", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    chunks = bodies(send("/v1/chat/completions", {**body, "max_tokens": 8}))
    assert chunks[-1]["usage"]["completion_tokens"] <= 8
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    chunks = bodies(send("/v1/chat/completions", {**body, "response_format": form}))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert json.loads(text)["a"] in (1, 2)
