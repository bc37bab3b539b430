"""`expertier train`: what a run leaves behind, how it continues, what is refused before anything is read."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from experiments.train.description.continuing import Asked
from experiments.train.description.description import described
from experiments.train.fitting import fitting_model
from experiments.train.metrics import MetricsLog, open_log, read_log, without_nan
from experiments.train.presets import PRESETS, TrainConfig, preset, with_steps
from experiments.train.run_folder import checkpoints, differences, expect_same_settings
from experiments.train.torch_run import train
from moe import ByteText, MoEForCausalLM, text_of


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return path


def begin(run, text, out, *options):
    return run("train", "--preset", "smoke", "--steps", "3", "--data", text, "--out", out, *options)


def test_a_byte_run_leaves_a_tokenizer_whose_ids_are_the_bytes_and_a_model_that_knows_its_end(run, text, tmp_path):
    assert begin(run, text, tmp_path / "a") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    words = "Ā hello . wörld \0 x\t\n\r\x7f 日本🎉 don't  \u0301"
    assert tokenizer(words)["input_ids"] == ByteText().encode(words)
    assert tokenizer.decode(ByteText().encode(words)) == words
    assert len(tokenizer) == 256
    model = MoEForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert (checkpoints(tmp_path / "a")[-1] / "tokenizer.json").is_file()


def test_a_model_whose_tokens_are_no_bytes_is_not_read_as_bytes(tiny_config, tmp_path):
    MoEForCausalLM(tiny_config(vocab_size=300)).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"300 tokens are not the 256 bytes; put the tokenizer's files"):
        text_of(tmp_path / "a", 300)
    assert isinstance(text_of(tmp_path, 256), ByteText)


def test_resume_alone_continues_with_the_runs_own_text_and_settings(run, text, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert (
        run(
            "train",
            "--preset",
            "smoke",
            "--router",
            "rmoe",
            "--steps",
            "3",
            "--seed",
            "7",
            "--data",
            "text.txt",
            "--out",
            "a",
        )
        == 0
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    weights = (tmp_path / "a/model.safetensors").read_bytes()
    assert run("train", "--resume", "--out", tmp_path / "a") == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == weights
    for same in (("--steps", "3"), ("--router", "rmoe"), ("--preset", "smoke", "--router", "rmoe"), ("--seed", "7")):
        assert run("train", "--resume", "--out", tmp_path / "a", *same) == 0
    capfd.readouterr()
    for other, said in (
        (("--steps", "9"), "(steps 3 there and 9 now)"),
        (("--seed", "8"), "(seed 7 there and 8 now)"),
        (("--router", "mixtral"), "model.router 'rmoe' there and 'mixtral' now"),
        (("--preset", "routers"), "model.hidden_size 64 there and 96 now"),
        (("--backend", "jax"), "was trained by torch, not by jax"),
        (("--router", "rmoes"), "rmoe"),
    ):
        assert run("train", "--resume", "--out", tmp_path / "a", *other) == 2
        printed = capfd.readouterr().err
        assert said in printed
        assert "{" not in printed, "settings are named one by one, not as a dictionary"


def test_a_run_says_what_it_read(run, text, tmp_path, capfd):
    assert begin(run, text, tmp_path / "a") == 0
    assert f"text: {text}: 1 file, 17,600 bytes, 20 documents" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "none"), "none: no such file or folder"),
        (("--tokenizer", "none"), "none: no such tokenizer"),
        (("--preset", "smok"), "unknown preset 'smok' (did you mean 'smoke'?)"),
        (("--resume",), "nothing to resume"),
        (("--mesh", "data=2"), "mesh is for the backend jax"),
        (("--router", "forced"), "replays a recorded routing, so it cannot be trained"),
        (("--router", "dense", "--preset", "smoke"), "presets that it fits: demo, routers, chains, small, e16, e64"),
        (("--router", "mixtrol"), "did you mean 'mixtral'"),
    ],
)
def test_what_cannot_run_is_refused_before_the_text_is_read(run, tmp_path, monkeypatch, capfd, options, message):
    monkeypatch.setattr("experiments.train.corpus.load_corpus", lambda *_, **__: pytest.fail("the text was read"))
    assert run("train", "--out", tmp_path / "a", *options) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["training", "held-out"])
def test_too_little_text_is_refused_before_training(tmp_path, corpus, tiny_training, part):
    short = {"train" if part == "training" else "held_out": corpus.train[:15]}
    with pytest.raises(ValueError, match=rf"the {part} text of random has 15 tokens, fewer than one sequence of 16"):
        train(tiny_training, replace(corpus, **short), tmp_path / "a", quiet=True)
    assert not (tmp_path / "a").exists()


def test_sequences_of_one_token_are_refused(tiny_training):
    with pytest.raises(ValueError, match="sequence_length must be at least 2"):
        replace(tiny_training, sequence_length=1)


# Ctrl-C is also tried within this process, in every phase of a step
@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_the_step_it_came_in(text, tmp_path, number):
    command = [sys.executable, "-m", "experiments.cli", "train", "--preset", "smoke", "--data", str(text)]
    command += ["--out", str(tmp_path / "a"), "--steps", "4000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=os.getcwd())
    log = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not (log.is_file() and log.read_text().count("\n") > 2)
    ):
        time.sleep(0.02)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"train --resume --out {tmp_path / 'a'} continues" in errors
    assert len(read_log(log)) == int(checkpoints(tmp_path / "a")[-1].name[5:])


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(tmp_path, corpus, tiny_training):
    train(replace(tiny_training, steps=3), corpus, tmp_path / "a", quiet=True)
    left = tmp_path / "a/checkpoints/.unfinished-x1"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "a/.model.safetensors.part").write_bytes(b"half")
    train(replace(tiny_training, steps=3), corpus, tmp_path / "a", quiet=True, resume=True)
    assert not left.exists()
    assert not list((tmp_path / "a").glob(".*"))


def test_fewer_steps_shorten_the_warm_up_and_more_do_not_lengthen_it():
    assert with_steps(preset("demo"), 3).warmup_steps == 3
    assert with_steps(preset("demo"), 10_000).warmup_steps == preset("demo").warmup_steps
    assert described(options={"preset": "demo", "steps": 3}).config == with_steps(preset("demo"), 3)


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_of_every_preset_continues_under_its_name(name, tmp_path):
    config = replace(preset(name), seed=3)
    read_back = TrainConfig(**json.loads(json.dumps(config.__dict__)))
    read_back = replace(read_back, betas=tuple(read_back.betas))
    asked = Asked(preset=name, router=None, steps=None, seed=None)
    assert asked.continued(tmp_path, read_back) == read_back


def test_differences_name_single_settings():
    begun = {"steps": 3, "model": {"num_experts": 8, "router_options": {"a": 1}}, "new_in_this_version": 1}
    wanted = {"steps": 3, "model": {"num_experts": 16, "router_options": {"a": 2}, "qk_norm": "full"}}
    assert differences(begun, wanted) == (
        "model.num_experts 8 there and 16 now, model.router_options.a 1 there and 2 now, "
        "model.qk_norm the default there and 'full' now"
    )
    assert differences(begun, {"steps": 3}) == ""


def test_what_cannot_change_the_result_may_differ(tmp_path, tiny_training):
    expect_same_settings(tmp_path, tiny_training, replace(tiny_training, evaluate_every=1, checkpoint_every=1))
    with pytest.raises(ValueError, match="learning_rate"):
        expect_same_settings(tmp_path, tiny_training, replace(tiny_training, learning_rate=1.0))


def test_numbers_that_are_not_finite_are_null(tmp_path):
    row = {"step": 1, "loss": float("nan"), "load": [[1.0, float("inf")]], "name": "x"}
    with open_log(tmp_path / "metrics.jsonl", last_step=0) as log:
        assert isinstance(log, MetricsLog)
        log.append(row)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == without_nan(row)
    assert without_nan(row)["load"] == [[1.0, None]]


def test_a_run_without_a_step_has_a_result_that_json_can_read(tmp_path, corpus, tiny_training):
    train(tiny_training, corpus, tmp_path / "a", quiet=True, stop_after_s=0.0)
    found = json.loads((tmp_path / "a/result.json").read_text(), parse_constant=pytest.fail)
    assert found["train_bits_per_byte"] is None
    assert found["held_out_bits_per_byte"] > 0


def test_a_misfit_names_the_presets_that_fit():
    with pytest.raises(ValueError, match="presets that it fits: demo, routers, chains, small, e16, e64"):
        fitting_model("mor-expert-2", preset("smoke").model)


def test_a_tokenizers_pad_and_end_reach_config_and_generation(tmp_path, corpus, tiny_training):
    marked = replace(corpus, end_token=3, pad_token=5)
    train(replace(tiny_training, steps=1), marked, tmp_path / "a", quiet=True)
    model = MoEForCausalLM.from_pretrained(tmp_path / "a")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (3, 5)
    assert model.generation_config.eos_token_id == 3
