"""The terminal chat: what it keeps, obeys and shows; a session through a pseudo-terminal with a real server."""

import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

from offload.chat.orders import Table
from offload.chat.pages import MarkdownPage, PlainPage, finished_blocks
from offload.chat.partners import Piece, ServerPartner, Took
from offload.chat.session import answer
from offload.chat.talk import Talk, load_talk
from offload.text.printable import PrintablePieces, printable
from tests.served_model import Served, make_tokenizer, save_model
from tests.small_engine import SmallEngine

ROOT = Path(__file__).parent.parent
TOOK = Took(reason="stop", prompt_tokens=9, cached_tokens=2, completion_tokens=5, first_s=1.0, seconds=3.0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;c2VjcmV0\x07y", "y"),
        ("\x9b2Jz", "z"),
        ("\x1bP1;2|payload\x1b\\z", "z"),
        ("a\x08\x7f\x00b\r\n", "ab\n"),
        ("\x1bc\x1b(Bx", "x"),
        ("\u202egnp.exe\u202c", "gnp.exe"),
        ("\x1b]never closed\nnext line", "\nnext line"),
        ("\x1b[12", ""),
        ("é😀日本", "é😀日本"),
    ],
)
def test_control_sequences_are_taken_out(text, shown):
    assert printable(text) == shown


@given(st.text(alphabet=st.sampled_from("\x1b\x9b\x9d\x07\x9c[]P\\;0m\nab\u202e"), max_size=40), st.integers(0, 40))
def test_nothing_of_a_model_controls_the_terminal(text, cut):
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    pieces = PrintablePieces()
    assert pieces.put(text[:cut]) + pieces.put(text[cut:]) == shown


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n", "one\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("~~~~\n~~~\n\n", ""),
        ("- a\n- b\n\nx\n\n```py\n\n", "- a\n- b\n\nx\n\n"),
    ],
)
def test_finished_blocks(text, done):
    assert finished_blocks(text) == (done, text[len(done) :])


def test_a_page_in_markdown_shows_all_text_once():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system=None)
    text = "# Title\n\nSome *words* here.\n\n- one\n- two\n\n```\ncode\n\nmore\n```\n\nlast [link](http://a.b)"
    with MarkdownPage(console, shows_reasoning=True) as page:
        page.show(Piece(channel="reasoning", text="I think.\x1b[31m"))
        for character in text:
            page.show(Piece(channel="content", text=character))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for word in ("I think.", "Title", "words", "one", "two", "code", "more", "http://a.b"):
        assert word in shown
    final = out.getvalue().rsplit("\x1b[", 1)[-1]
    assert final.count("last") == 1
    assert "\x1b]8" not in out.getvalue()


def test_a_plain_page_ends_with_a_line_end_and_hides_reasoning():
    written = []
    with PlainPage(written.append) as page:
        page.show(Piece(channel="reasoning", text="hidden"))
        page.show(Piece(channel="content", text="a\x1b[3"))
        page.show(Piece(channel="content", text="1mb"))
    assert "".join(written) == "ab\n"


class Scripted:
    """A partner that says what it is told to; records what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def reply(self, talk):
        self.asked.append([dict(message) for message in talk.shown])
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield Piece(channel="content", text=piece) if isinstance(piece, str) else piece

    def state(self):
        return ["experts: hit rate 0.5"]

    def close(self):
        pass


@pytest.fixture
def table():
    said = []
    table = Table(Talk(), Scripted(["one", TOOK], ["two"], ["three"]), said.append)
    table.said = said
    return table


def turn(table, line):
    table.take(line)
    if table.is_asked:
        answer(table, lambda: PlainPage(lambda text: None))


def test_questions_answers_undo_and_again(table):
    turn(table, "first?")
    assert table.talk.messages == [{"role": "user", "content": "first?"}, {"role": "assistant", "content": "one"}]
    turn(table, "/again")
    assert table.talk.messages[-1] == {"role": "assistant", "content": "two"}
    turn(table, "/undo")
    assert table.talk.messages == []
    turn(table, "/system Be brief.")
    turn(table, "//not an order")
    assert table.partner.asked[-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "/not an order"},
    ]
    turn(table, "/system -")
    turn(table, "/new")
    assert table.talk.shown == []
    with pytest.raises(ValueError, match="nothing has been said"):
        turn(table, "/undo")
    with pytest.raises(ValueError, match="did you mean 'again'"):
        turn(table, "/agian")
    turn(table, "/quit")
    assert table.is_over


def test_settings_are_checked(table):
    turn(table, "/set temperature 0.7")
    turn(table, "/set seed 3")
    assert table.talk.settings == {"temperature": 0.7, "seed": 3}
    turn(table, "/set seed default")
    turn(table, "/set")
    assert table.said[-1] == "temperature 0.7"
    for line, words in (
        ("/set temprature 1", "did you mean 'temperature'"),
        ("/set temperature hot", "must be a number"),
        ("/set top_p 3", "top_p"),
        ("/set max_new_tokens 0", "1 or more"),
        ("/think maybe", "/think"),
        ("/save", "needs the name"),
    ):
        with pytest.raises(ValueError, match=words):
            turn(table, line)
    turn(table, "/think off")
    turn(table, "/think hide")
    assert table.talk.thinking is False
    assert not table.shows_reasoning


def test_stats_and_help(table):
    turn(table, "/stats")
    assert table.said[0] == "no answer yet"
    turn(table, "x")
    turn(table, "/stats")
    assert "5 tokens, 2.00 tok/s, first after 1.0 s; 9 of prompt, 2 kept (stop)" in table.said
    turn(table, "/help")
    assert any(line.startswith("/undo") for line in table.said)


def test_a_conversation_is_kept_and_read_again(table, tmp_path):
    turn(table, "/system Be brief.")
    turn(table, "/set temperature 0.5")
    turn(table, "x")
    turn(table, f"/save {tmp_path / 'talk.json'}")
    kept = table.talk
    turn(table, "/new")
    turn(table, f"/load {tmp_path / 'talk.json'}")
    assert table.talk == kept or table.talk.messages == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "one"},
    ]
    assert table.talk.system == "Be brief."
    assert table.talk.settings == {"temperature": 0.5}


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9}', '{"version": 1, "system": 5}', "null"])
def test_a_file_that_is_no_conversation_is_refused(tmp_path, text):
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="cannot be read"):
        load_talk(file)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said():
    said = []
    table = Table(Talk(), Scripted(["half", KeyboardInterrupt()], [RuntimeError("gone")]), said.append)
    turn(table, "x")
    assert table.talk.messages[-1] == {"role": "assistant", "content": "half"}
    assert said == ["stopped"]
    with pytest.raises(RuntimeError, match="gone"):
        turn(table, "y")
    assert table.talk.messages[-1] == {"role": "user", "content": "y"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path_factory.mktemp("tiny"))).eval()
    with Served(SmallEngine(model, [257], step_s=0.02), make_tokenizer()) as served:
        yield served


def test_a_server_answers(served):
    talk = Talk(settings={"temperature": 0, "max_new_tokens": 8})
    talk.ask("Hi")
    partner = ServerPartner(served.url)
    assert partner.model == "tiny"
    *pieces, took = partner.reply(talk)
    assert "".join(piece.text for piece in pieces)
    assert took.completion_tokens == 8
    assert took.reason == "length"
    talk.thinking = True
    talk.settings["max_new_tokens"] = 40
    assert any(piece.channel == "reasoning" for piece in partner.reply(talk) if isinstance(piece, Piece))
    talk.settings["max_new_tokens"] = -1
    with pytest.raises(RuntimeError, match="refuses: max_tokens"):
        list(partner.reply(talk))
    partner.close()
    for url in ("http://127.0.0.1:9", "ftp://x", served.url + "/nothing"):
        with pytest.raises(ValueError, match="--server"):
            ServerPartner(url)


def test_once_prints_plain_text_for_pipes(run, served, capsys):
    arguments = ("--server", served.url, "--once", "Hi", "--temperature", 0, "--max-new-tokens", 8)
    assert run("chat", *arguments) == 0
    first = capsys.readouterr().out
    talk = Talk(settings={"temperature": 0, "max_new_tokens": 8})
    talk.ask("Hi")
    partner = ServerPartner(served.url)
    text = "".join(piece.text for piece in partner.reply(talk) if isinstance(piece, Piece))
    partner.close()
    assert first == printable(text) + "\n"


def test_a_model_in_this_process_answers_as_generate_does(run, tmp_path, capsys):
    folder = save_model(tmp_path / "m")
    short = ("--temperature", 0, "--max-new-tokens", 8, "--cache-experts", 2)
    assert run("generate", folder, "--chat", "--prompt", "Hi", *short) == 0
    expected = printable(capsys.readouterr().out)
    assert run("chat", folder, "--once", "Hi", *short) == 0
    assert capsys.readouterr().out == expected


def test_lines_of_a_pipe_are_turns_and_the_session_is_kept(run, served, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set max_new_tokens 4\nHi\n\nMore\n/wrong\n"))
    file = tmp_path / "talk.json"
    assert run("chat", "--server", served.url, "--temperature", 0, "--session", file) == 0
    captured = capsys.readouterr()
    assert "unknown order 'wrong'" in captured.err
    kept = json.loads(file.read_text())
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant", "user", "assistant"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Again\n"))
    assert run("chat", "--server", served.url, "--session", file) == 0
    assert len(json.loads(file.read_text())["messages"]) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a model's folder or --server URL"),
        (("none-here",), "no such folder"),
        (("--server", "http://127.0.0.1:9"), "no list of models"),
        (("--server", "x", "--once", " "), "--once is empty"),
        (("--server", "x", "--thinking", "maybe"), "--thinking"),
        (("--server", "x", "--temperature", "-1"), "temperature"),
    ],
)
def test_what_cannot_work_is_one_line(run, capsys, arguments, words):
    assert run("chat", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, command, environment):
        self.leader, follower = pty.openpty()
        # the program's own session and terminal, so that Ctrl-C reaches it and not these tests
        self.process = subprocess.Popen(
            command,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            cwd=ROOT,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(follower)
        self.text = ""

    def type(self, text):
        os.write(self.leader, text.encode())

    def read_until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self.leader], [], [], 0.1)[0]:
                self.text += os.read(self.leader, 1 << 16).decode(errors="replace")


def test_a_session_in_a_terminal(served, tmp_path):
    environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [sys.executable, "-m", "experiments.cli", "chat", "--server", served.url, "--max-new-tokens", "400"]
    # an answer drawn without a seed may end before anybody can stop it
    terminal = Terminal([*command, "--seed", "1"], environment)
    try:
        terminal.read_until(lambda text: ">" in text, 120)
        steps = served.engine.steps
        terminal.type("one line\x1b\rand another\r")
        terminal.read_until(lambda text: served.engine.steps > steps + 5)
        terminal.type("\x03")
        terminal.read_until(lambda text: "stopped" in text)
        terminal.text = ""
        terminal.type("/stats\r")
        terminal.read_until(lambda text: "tiny at" in text)
        assert terminal.process.poll() is None
        terminal.type(f"/save {tmp_path / 'talk.json'}\r")
        # only at the prompt: a terminal outside raw mode takes Ctrl-D for itself
        terminal.read_until(lambda text: ">" in text.partition("kept in")[2])
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.leader)
    kept = json.loads((tmp_path / "talk.json").read_text())
    assert kept["messages"][0]["content"] == "one line\nand another"
    history = tmp_path / "expertier" / "chat_history"
    assert "+one line" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    deadline = time.monotonic() + 10
    while served.engine.active:
        assert time.monotonic() < deadline
