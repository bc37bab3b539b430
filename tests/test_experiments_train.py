import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.train.corpus import Corpus
from experiments.train.metrics import open_log, read_log
from experiments.train.presets import PRESETS, preset
from experiments.train.run_folder import checkpoints
from experiments.train.schedule import learning_rate
from experiments.train.torch_run import train
from moe import MoEForCausalLM


def parameters(run):
    return MoEForCausalLM.from_pretrained(run).state_dict()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, corpus, precision, tiny_training):
    config = replace(tiny_training, precision=precision)
    train(config, corpus, tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in checkpoints(tmp_path / "cut")[1:]:
        shutil.rmtree(folder)
    train(config, corpus, tmp_path / "cut", resume=True, quiet=True)
    whole, resumed = parameters(tmp_path / "whole"), parameters(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    ignored = ("tokens_per_second",)
    for one, other in zip(*(read_log(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut")), strict=True):
        assert {k: v for k, v in one.items() if k not in ignored} == {
            k: v for k, v in other.items() if k not in ignored
        }


@pytest.mark.parametrize("moment", ["forward", "optimiser"])
def test_ctrl_c_in_the_middle_of_a_step_lets_it_end_and_the_rest_is_the_same(
    tmp_path, corpus, tiny_training, monkeypatch, moment
):
    """Jitter draws in the forward pass; a step that was saved half done would draw, or be applied, twice."""
    train(tiny_training, corpus, tmp_path / "whole", quiet=True)
    interrupt_at(monkeypatch, moment, call=5)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_training, corpus, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(read_log(tmp_path / "cut" / "metrics.jsonl")) == int(checkpoints(tmp_path / "cut")[-1].name[5:])
    train(tiny_training, corpus, tmp_path / "cut", resume=True, quiet=True)
    whole, resumed = parameters(tmp_path / "whole"), parameters(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupt_at(monkeypatch, moment, call):
    """Send SIGINT right after the given call of a model's forward or an optimiser's step."""
    owner, name = (MoEForCausalLM, "forward") if moment == "forward" else (torch.optim.AdamW, "step")
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, wrapped)


def test_a_second_ctrl_c_ends_at_once(tmp_path, corpus, tiny_training, monkeypatch):
    interrupt_at(monkeypatch, "forward", call=3)
    interrupt_at(monkeypatch, "optimiser", call=2)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_training, corpus, tmp_path / "run", quiet=True)
    assert not checkpoints(tmp_path / "run")


def test_resuming_a_finished_run_repeats_its_result(tmp_path, corpus, tiny_training):
    first = train(tiny_training, corpus, tmp_path / "run", quiet=True)
    again = train(tiny_training, corpus, tmp_path / "run", resume=True, quiet=True)
    assert replace(again, seconds=first.seconds) == first


def test_a_run_is_not_continued_on_another_text(tmp_path, corpus, tiny_training):
    train(tiny_training, corpus, tmp_path / "run", quiet=True)
    other = replace(corpus, train=corpus.train[::-1], source="backwards")
    with pytest.raises(ValueError, match=r"was begun on another text .*; now backwards"):
        train(tiny_training, other, tmp_path / "run", resume=True, quiet=True)


def test_nothing_is_left_of_a_run_that_could_not_be_built(tmp_path, corpus, tiny_training):
    impossible = replace(tiny_training, model=tiny_training.model | {"router": "base"})
    with pytest.raises(ValueError, match="exactly 1 expert"):
        train(impossible, corpus, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a run needs a folder"):
        train(tiny_training, corpus, tmp_path / "file", quiet=True)


def test_metrics_have_what_a_run_is_judged_by(tmp_path, corpus, tiny_training):
    train(tiny_training, corpus, tmp_path / "run", quiet=True)
    rows = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    keys = {
        "loss",
        "lm_loss",
        "bits_per_byte",
        "tokens_per_second",
        "max_vio",
        "router_entropy",
        "dead_experts",
        "load",
    }
    assert keys <= rows[0].keys()
    assert np.asarray(rows[0]["load"]).shape == (2, 4)
    assert [row["step"] for row in rows if "held_out_bits_per_byte" in row] == [4, 8]


def test_training_learns(tmp_path, tiny_training):
    text = np.frombuffer(b"abcdefgh" * 2_000, np.uint8)
    corpus = Corpus(train=text, held_out=text[:500], vocab_size=256, tokens_per_byte=1.0, source="cycle")
    config = replace(tiny_training, model=tiny_training.model | {"vocab_size": 256}, steps=60, learning_rate=1e-2)
    assert train(config, corpus, tmp_path / "run", quiet=True).held_out_bits_per_byte < 0.5


def test_a_torn_last_line_and_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with open_log(path, last_step=2) as log:
        log.append({"step": 3, "new": True})
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]


def test_an_existing_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path, corpus, tiny_training):
    with pytest.raises(ValueError, match="nothing to resume"):
        train(tiny_training, corpus, tmp_path / "run", resume=True, quiet=True)
    train(replace(tiny_training, steps=1), corpus, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="--resume"):
        train(tiny_training, corpus, tmp_path / "run", quiet=True)


def test_a_run_that_is_out_of_time_ends_early_and_can_be_continued(tmp_path, corpus, tiny_training):
    assert train(tiny_training, corpus, tmp_path / "run", quiet=True, stop_after_s=0.0).steps == 0
    assert train(tiny_training, corpus, tmp_path / "run", resume=True, quiet=True).steps == 8


def test_a_run_is_not_continued_under_other_settings(tmp_path, corpus, tiny_training):
    train(replace(tiny_training, steps=3), corpus, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="steps 3 there and 8 now"):
        train(tiny_training, corpus, tmp_path / "run", resume=True, quiet=True)


@pytest.mark.slow
def test_kill_minus_nine_during_training_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 2_000)
    arguments = ["train", "--preset", "smoke", "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "30"]
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=os.getcwd())
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not checkpoints(tmp_path / "run"):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints(tmp_path / "run")
    assert run(*arguments, "--resume") == 0
    assert [row["step"] for row in read_log(log)] == list(range(1, 31))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 30
    assert not list(Path(tmp_path / "run").rglob("*.part"))


def test_schedules_by_hand(tiny_training):
    cosine = replace(tiny_training, steps=102, warmup_steps=2, learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(cosine, 0) == 0.5
    assert learning_rate(cosine, 2) == 1.0
    assert learning_rate(cosine, 52) == pytest.approx(0.55)
    assert learning_rate(cosine, 102) == pytest.approx(0.1)
    wsd = replace(cosine, schedule="wsd", decay_share=0.5)
    assert learning_rate(wsd, 51) == 1.0
    assert learning_rate(wsd, 102) == pytest.approx(0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    assert preset(name).steps > 0


def test_bad_settings_are_refused(tiny_training):
    with pytest.raises(ValueError, match="unknown preset"):
        preset("huge")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        replace(tiny_training, steps=0)
    with pytest.raises(ValueError, match="schedule"):
        replace(tiny_training, schedule="line")
