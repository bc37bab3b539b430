"""`expertier generate`, `fit` and `trace record` as a user calls them."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from routing.traces import RoutingTrace


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        head_dim=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_generate(model_folder, run, tmp_path):
    arguments = ("--prompt", "abc", "--max-new-tokens", 9, "--cache-experts", 2)
    outputs = ("--trace", tmp_path / "t.npz", "--json", tmp_path / "g.json")
    assert run("generate", model_folder, *arguments, *outputs) == 0
    report = json.loads((tmp_path / "g.json").read_text())
    resident = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = resident.generate(torch.tensor([list(b"abc")]), max_new_tokens=9, do_sample=False)[0, 3:]
    assert report["token_ids"] == expected.tolist()
    for key in ("tokens_per_second", "prefill_seconds", "hit_rate", "bytes_read", "peak_memory_bytes"):
        assert report[key] > 0
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert (trace.num_tokens, trace.num_layers, trace.num_experts) == (3 + len(expected) - 1, 2, 8)


def test_generate_says_what_was_to_be_expected(model_folder, run, tmp_path, capsys):
    rates = dict.fromkeys(("disk", "cached", "memory", "exact", "fast"), 1e9)
    lines = [f"{name}_bytes_per_s = {rate}" for name, rate in rates.items()] + ["layer_s = 0.5"]
    (tmp_path / "h.toml").write_text("\n".join(lines))
    arguments = ("--prompt", "abc", "--max-new-tokens", 5, "--cache-experts", 8, "--hardware", tmp_path / "h.toml")
    assert run("generate", model_folder, *arguments, "--json", tmp_path / "g.json") == 0
    predicted = json.loads((tmp_path / "g.json").read_text())["predicted"]
    # two layers of half a second each, half of that for each miss, and next to nothing for a tiny model's bytes
    misses = 2 * 2 * (1 - predicted["hit_rate"])
    assert predicted["token_s"] == pytest.approx(1.0 + 0.25 * misses, rel=0.01)
    assert predicted["tokens_per_second"] == pytest.approx(1 / predicted["token_s"])
    assert 0 <= predicted["hit_rate"] <= 1
    assert "achieved" in capsys.readouterr().err
    assert run("generate", model_folder, "--prompt", "abc", "--hardware", tmp_path / "none.toml") == 2


def test_a_live_line_says_how_it_goes(model_folder, run, monkeypatch, capsys):
    monkeypatch.setattr("offload.serve.live_text.STATUS_EVERY_S", 0.0)
    assert run("generate", model_folder, "--prompt", "abc", "--max-new-tokens", 5, "--cache-experts", 2, "--live") == 0
    assert re.search(r"tok/s, hit rate 0\.\d+, read .*, disk busy \d+% of the time", capsys.readouterr().err)


def test_fit(model_folder, run, tmp_path, capsys):
    assert run("fit", model_folder, "--cpu-memory", "16GiB", "--json", tmp_path / "f.json") == 0
    assert json.loads((tmp_path / "f.json").read_text())["slots_per_layer"] == [8, 8]
    assert run("fit", model_folder, "--cpu-memory", "300MiB", "--json", tmp_path / "f.json") == 1
    assert json.loads((tmp_path / "f.json").read_text())["fits"] is False
    assert "give at least" in " ".join(capsys.readouterr().out.split())


def test_trace_record(model_folder, run, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 20)
    arguments = ("--data", tmp_path / "book.txt", "--out", tmp_path / "t.npz", "--tokens", 150, "--length", 64)
    assert run("trace", "record", model_folder, *arguments, "--cache-experts", 3) == 0
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert trace.num_tokens == 150
    assert trace.sequence_T.tolist() == [0] * 64 + [1] * 64 + [2] * 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cpu-memory", "50MiB"), "too small"),
        (("--cpu-memory", "much"), "as a size"),
        (("--policy", "x", "--cache-experts", "2"), "unknown cache policy"),
        (("--trace", "nowhere/t.npz"), "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model_folder, run, capsys, arguments, message):
    assert run("generate", model_folder, "--prompt", "a", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_kill_during_recording_leaves_a_whole_trace(model_folder, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 50_000)
    out = tmp_path / "t.npz"
    command = [sys.executable, "-m", "experiments.cli", "trace", "record", str(model_folder)]
    command += ["--data", str(tmp_path / "book.txt"), "--out", str(out), "--tokens", "10000000", "--length", "64"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RoutingTrace.load(out).num_tokens > 0
