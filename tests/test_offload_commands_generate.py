"""What `generate` prints, reads and refuses; the terminal while it runs."""

import io
import json
import os
import pty
import re
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

from offload.commands import screen as screen_module
from offload.commands.screen import Screen
from offload.serve.text import expect_room, open_text


def _save_model(folder, vocab_size=256, **changes):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = OlmoeConfig(**sizes, **heads, **{"eos_token_id": None, "pad_token_id": 0, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A model with a tokenizer of its own."""
    folder = _save_model(tmp_path_factory.mktemp("worded"), 300)
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["?"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen_of(written, width):
    """What a terminal shows after these bytes: enough of its language for rich's live displays."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", written, flags=re.DOTALL):
        if part == "\n":
            row, column = row + 1, 0
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            count, kind = part[2:-1], part[-1]
            if kind == "A":
                row = max(row - int(count or 1), 0)
            elif kind == "K":
                rows[row] = "" if count == "2" else rows[row][:column]
            continue
        else:
            if column == width:
                row, column = row + 1, 0
            while len(rows) <= row:
                rows.append("")
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
        while len(rows) <= row:
            rows.append("")
    return [line.rstrip() for line in rows]


@pytest.mark.parametrize("is_live", [True, False])
def test_status_and_text_share_a_terminal_without_loss(monkeypatch, is_live):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    pieces = ["Once upon", " a time [red]there", " was\n", "a ", "line " * 30, "\n\nand ünïcödé — the", " end"]
    with Screen(is_live=is_live) as screen:
        screen.stage("loading")
        screen._region.refresh()
        for number, piece in enumerate(pieces):
            screen.show(piece)
            screen.status(f"{number}.00 tok/s, hit rate 0.5")
            if screen._region.is_started:
                screen._region.refresh()
    shown = screen_of(terminal.getvalue(), 40)
    expected = [
        line[start : start + 40] for line in "".join(pieces).split("\n") for start in range(0, len(line) or 1, 40)
    ]
    assert [line for line in shown if line] == [line.rstrip() for line in expected if line.strip()]
    assert ("tok/s" in terminal.getvalue()) == is_live


def test_generate_live_on_a_pseudo_terminal(model, run, monkeypatch, tmp_path):
    monkeypatch.setattr("offload.serve.live_text.STATUS_EVERY_S", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        arguments = ("--prompt", "abc", "--max-new-tokens", 9, "--cache-experts", 2, "--live")
        assert run("generate", model, *arguments, "--json", tmp_path / "g.json") == 0
        monkeypatch.undo()
    written = b""
    while True:
        try:
            data = os.read(leader, 1 << 16)
        except OSError:
            break
        if not data:
            break
        written += data
    os.close(leader)
    report = json.loads((tmp_path / "g.json").read_text())
    text = written.decode().replace("\r\n", "\n")
    assert "disk busy" in text
    assert "prefill:" in text
    shown = "".join(screen_of(text, 80))
    remaining = iter(shown)
    assert all(letter in remaining for letter in report["text"] if letter.isalnum())  # in this order


def test_stdout_holds_the_text_and_nothing_else(worded, run, capsys, tmp_path):
    arguments = ("--prompt", "the quick", "--max-new-tokens", 12, "--cache-experts", 2, "--live")
    assert run("generate", worded, *arguments, "--json", tmp_path / "g.json") == 0
    report = json.loads((tmp_path / "g.json").read_text())
    captured = capsys.readouterr()
    assert captured.out == report["text"] + "\n"
    assert report["prompt_tokens"] == len(open_text(worded).encode("the quick"))
    assert report["text"] == open_text(worded).decode(report["token_ids"])
    assert report["note"] == ""
    assert all(len(line) <= 80 for line in captured.err.splitlines())


def test_a_prompt_from_stdin(model, run, monkeypatch, tmp_path, capsys):
    for data, code in ((b"abc", 0), (b"ab\xff", 2), (b"", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        arguments = ("--prompt", "-", "--max-new-tokens", 3, "--cache-experts", 2, "--json", tmp_path / "g.json")
        assert run("generate", model, *arguments) == code
    assert json.loads((tmp_path / "g.json").read_text())["prompt"] == "abc"
    assert "not UTF-8 text (byte 2)" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_so(model, run, capsys):
    assert run("generate", model, "--prompt", "a", "--max-new-tokens", 2, "--cache-experts", 2) == 0
    assert "has no tokenizer: text goes in and comes out as UTF-8 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "20", "--max-new-tokens", "30"), "24 tokens of prompt and 30 new ones are 54"),
        (("--context", "30"), "give --context 88 or --max-new-tokens 6"),
        (("--context", "24"), "give --context 88"),
        (("--cpu-memory", "6"), "did you mean 6GiB?"),
        (("--policy", "lruu"), "did you mean 'lru'?"),
        (("--policy", "belady"), "unknown cache policy"),
        (("--prefetch", "gates"), "did you mean 'gate'?"),
        (("--prefetch", "none.npz"), "predictor none.npz: no such file"),
        (("--io", "directly"), "unknown way of reading"),
        (("--arithmetic", "quick"), "there are auto, exact, fast, fixed"),
        (("--device", "cpu", "--gpu-memory", "8GiB"), "--device cpu has no GPU memory"),
        (("--plan", "/dev/null", "--cache-experts", "2"), "/dev/null: no such file"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_read(model, run, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("offload.runtime.loading.load", lambda *_, **__: pytest.fail("the model is read"))
    assert run("generate", model, "--prompt", "the prompt has 24 chars.", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_room():
    expect_room(10, 20, 30)
    with pytest.raises(ValueError, match=r"give --context 31 or --max-new-tokens 19$"):
        expect_room(11, 20, 30)
    with pytest.raises(ValueError, match=r"give --context 50$"):
        expect_room(30, 20, 30)


def _copy(folder, out):
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not JSON"),
        (
            lambda folder: [
                (folder / "tokenizer.json").unlink(),
                (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.T", null]}}'),
            ],
            "Python code in the folder, which is never run",
        ),
        (lambda folder: _change_vocabulary(folder / "config.json", 260), "belongs to another model"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(worded, tmp_path, change, message):
    folder = _copy(worded, tmp_path / "m")
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        open_text(folder).encode_prompt("the quick brown fox jumps")
    assert len(str(refused.value).splitlines()) == 1


def _change_vocabulary(file, size):
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": size}))


def test_a_terminal_is_shared_only_if_it_is_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert screen_module._is_same_terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not screen_module._is_same_terminal()
