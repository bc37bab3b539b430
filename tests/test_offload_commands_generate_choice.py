"""`generate` with sampling, stop strings, the chat template and files of prompts."""

import json

import pytest

from offload.serve.prompt_file import AnswerFile, read_prompts
from tests.served_model import save_model

SHORT = ("--max-new-tokens", 16, "--cache-experts", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def generate(run, folder, tmp_path, capsys):
    def call(*arguments):
        assert run("generate", folder, *SHORT, *arguments, "--json", tmp_path / "report.json") == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert capsys.readouterr().out == report["text"] + "\n" * bool(report["text"])
        return report

    return call


def test_a_seed_gives_the_same_text_and_another_seed_another(generate):
    warm = ("--prompt", "ab", "--temperature", 1.0)
    first = generate(*warm, "--seed", 5)
    assert generate(*warm, "--seed", 5)["token_ids"] == first["token_ids"]
    assert generate(*warm, "--seed", 6)["token_ids"] != first["token_ids"]


def test_narrow_sampling_is_greedy(generate):
    greedy = generate("--prompt", "ab")["token_ids"]
    for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert generate("--prompt", "ab", "--temperature", 1.0, *narrow)["token_ids"] == greedy
    assert generate("--prompt", "ab", "--frequency-penalty", 2, "--presence-penalty", 2)["token_ids"] != greedy


def test_a_stop_string_ends_text_and_work(generate):
    whole = generate("--prompt", "ab")
    assert whole["finish_reason"] == "length"
    stop = whole["text"][3:5]
    found = generate("--prompt", "ab", "--stop", stop, "--stop", "never in it")
    assert found["text"] == whole["text"][: whole["text"].index(stop)]
    assert found["finish_reason"] == "stop"
    assert len(found["token_ids"]) < len(whole["token_ids"])
    assert found["token_ids"] == whole["token_ids"][: len(found["token_ids"])]


def test_a_chat_uses_the_template(generate, tmp_path):
    raw = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    by_hand = generate("--prompt", raw)
    assert generate("--prompt", "Hi", "--chat", "--system", "Be brief.")["token_ids"] == by_hand["token_ids"]
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[-1].content }}")
    assert generate("--prompt", "Hi", "--chat", "--chat-template", other)["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "a", "--temperature", "-1"), "temperature must be 0 to 100"),
        (("--prompt", "a", "--top-p", "2"), "top_p"),
        (("--prompt", "a", "--stop", ""), "--stop is empty"),
        (("--prompt", "a", "--system", "x"), "need --chat"),
        ((), "either --prompt TEXT or --prompts FILE"),
        (("--prompt", "a", "--prompts", "b"), "either --prompt TEXT or --prompts FILE"),
        (("--prompts", "b"), "--prompts needs --out FILE"),
        (("--prompt", "a", "--batch-size", 2), "one prompt is no batch"),
    ],
)
def test_what_cannot_work_is_refused(run, folder, capsys, arguments, words):
    assert run("generate", folder, *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_file_of_prompts_is_answered_and_a_second_run_goes_on(run, folder, tmp_path, capsys, generate):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"id": "a", "prompt": "ab"},
        {"messages": [{"role": "user", "content": "Hi"}], "max_new_tokens": 4},
        {"id": 3, "prompt": "xyz"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert run("generate", folder, "--prompts", prompts, "--out", out, *SHORT) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(answer["line"], answer.get("id")) for answer in answers] == [(1, "a"), (2, None), (3, 3)]
    assert len(answers[1]["token_ids"]) <= 4
    whole = out.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    out.write_bytes(first + second[:20])
    assert run("generate", folder, "--prompts", prompts, "--out", out, *SHORT) == 0
    assert out.read_bytes() == whole
    assert "1 of 3 prompts have an answer" in capsys.readouterr().err
    assert run("generate", folder, "--prompts", prompts, "--out", out, *SHORT) == 0
    assert out.read_bytes() == first + second + third == whole
    capsys.readouterr()
    assert answers[0]["token_ids"] == generate("--prompt", "ab")["token_ids"]
    batched = ("--batch-size", 2, "--arithmetic", "fixed")
    assert run("generate", folder, "--prompts", prompts, "--out", tmp_path / "b", *batched, *SHORT) == 0
    assert "2 batches in order: nothing foresees the experts" in capsys.readouterr().err
    alone = tmp_path / "alone.jsonl"
    assert run("generate", folder, "--prompts", prompts, "--out", alone, "--arithmetic", "fixed", *SHORT) == 0
    assert sorted((tmp_path / "b").read_text().splitlines()) == sorted(alone.read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is none"),
        ("{", "line 1: not JSON"),
        ('\n{"prompt": ""}', "line 2: prompt must be a text"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"prompt": "a", "temperature": 1}', "unknown field 'temperature'"),
        ('{"messages": [{"role": "user"}]}', "texts role and content"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be"),
        ('{"prompt": "a", "seed": "x"}', "seed must be"),
        ('{"prompt": "a", "id": []}', "id must be"),
    ],
)
def test_files_of_prompts_are_checked(tmp_path, text, words):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_prompts(file)


def test_answers_to_other_prompts_are_not_added_to(tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text('{"id": "a", "prompt": "x"}\n')
    for line in ('{"line": 2, "id": "a"}', '{"line": 1, "id": "b"}', "[]", "none"):
        out.write_text(line + "\n")
        with pytest.raises(ValueError, match=r"a.jsonl, line 1: no answer"):
            AnswerFile(out, read_prompts(prompts))
