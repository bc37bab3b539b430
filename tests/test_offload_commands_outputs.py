"""No command writes over what it reads: refused before any work, by file and not by name."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, OlmoeConfig

from routing.ground.expect import expect_not_an_input, expect_outputs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "m"
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = OlmoeConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def place(tmp_path, model):
    """A folder of inputs, of which only the model is real: everything else is refused before it is read."""
    os.symlink(model, tmp_path / "linked")
    for name in ("t.npz", "p.json", "q.json", "h.toml", "l.json", "book.txt", "x.bin"):
        (tmp_path / name).write_text(name)
    (tmp_path / "m").mkdir()
    for file in model.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m2").mkdir()
    (tmp_path / "m2" / "config.json").write_text("{}")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    return tmp_path


def _state(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


GENERATE = "generate m --prompt a --max-new-tokens 2 --cache-experts 2"
REFUSED = (
    "pack m --out m/config",  # its index would be m/config.json
    "pack m --out m/config.json",
    "pack m --out m/SHARD",
    "pack m --out m/model.safetensors.index",
    "pack m --out m",
    "pack m --out book.txt",
    "pack linked --out book.txt",
    f"{GENERATE} --trace m/SHARD",
    f"{GENERATE} --json m/config.json",
    f"{GENERATE} --json both --trace both",
    f"{GENERATE} --hardware h.toml --json h.toml",
    f"{GENERATE} --prefetch t.npz --trace t.npz",
    f"{GENERATE} --pack x.bin --json x.bin",
    "generate m --prompt a --plan t.npz --trace t.npz",
    "fit m --json m/generation_config.json",
    "fit m --hardware h.toml --json h.toml",
    "simulate t.npz --cache-experts 2 --json t.npz",
    "calibrate --out book.txt",
    "trace show t.npz --json t.npz",
    "trace show t.npz --plot t.npz",
    "trace import x.bin --format csv --out x.bin",
    "trace predictor t.npz --out t.npz",
    "trace predictor t.npz --out new.npz --json t.npz",
    "trace batches t.npz --json t.npz",
    "trace record m --data book.txt --out book.txt",
    "trace record m --data texts --out texts/a.txt",
    "trace record m --data book.txt --out m/SHARD",
    "place score p.json --trace t.npz --json t.npz",
    "place score p.json --trace t.npz --json p.json",
    "place score p.json --loads l.json --json l.json",
    "place check p.json --trace t.npz --json t.npz",
    "place report p.json --loads l.json --out p.json",
    "place migrate p.json q.json --out q.json",
    "place migrate p.json q.json --out new.json --plan-out p.json",
    "place tiers --hardware h.toml --expert-size 1MB --loads l.json --out l.json",
    "convert m --to latent --group 2 --rank 2 --out new --json m/config.json",
    "convert m --to latent --group 2 --rank 2 --out new --data book.txt --json book.txt",
    "refactor m --data book.txt --out new --json book.txt",
    "prune m --keep 2 --out new --trace t.npz --json t.npz",
    "join m m2 --out new --json m2/config.json",
    "compare --routers top2 --out new --data book.txt --json book.txt",
    "compare --routers top2 --out texts --data texts",
    "train --out texts --data texts",
    "train --out m --tokenizer m",
    "demo --out texts --data texts",
    "bench offload m --trace t.npz --json t.npz",
    "bench offload m --json m/config.json",
    "bench duo --out new --data book.txt --json book.txt",
)


@pytest.mark.parametrize("line", REFUSED)
def test_an_output_over_an_input(place, run, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    before = _state(place)
    shard = next((place / "m").glob("*.safetensors")).name
    assert run(*line.replace("SHARD", shard).split()) == 2, line
    assert _state(place) == before
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert "cannot write" in error or "two outputs" in error


def test_a_pack_may_replace_an_earlier_one_of_the_same_model(model, tmp_path, run):
    folder = tmp_path / "m"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    out = folder / "experts"
    assert run("pack", folder, "--out", out) == 0
    first = _state(folder)
    assert run("pack", folder, "--out", out) == 0
    assert _state(folder) == first
    index = json.loads((folder / "experts.json").read_text())
    index["layers"][0]["module"] = "another.model"
    (folder / "experts.json").write_text(json.dumps(index))
    assert run("pack", folder, "--out", out) == 2


def test_an_unfinished_copy_of_something_else_is_not_touched(model, tmp_path, run):
    (tmp_path / "e.part.json").write_text("{}")
    assert run("pack", model, "--out", tmp_path / "e") == 2
    assert (tmp_path / "e.part.json").read_text() == "{}"


def test_what_an_output_may_not_be(tmp_path):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "a.txt"
    source.write_text("a")
    os.link(source, tmp_path / "hard")
    os.symlink(source, tmp_path / "soft")
    for name in (source, tmp_path / "hard", tmp_path / "soft", tmp_path / "in" / ".." / "in" / "a.txt"):
        for inputs in ([source], [tmp_path / "in"], [None, str(source)]):
            with pytest.raises(ValueError, match="this command reads"):
                expect_outputs(name, inputs=inputs)
    expect_outputs(None, tmp_path / "in" / "new.txt", tmp_path / "other", inputs=[tmp_path / "in", "an/id", None])
    with pytest.raises(ValueError, match="two outputs"):
        expect_outputs(tmp_path / "x", tmp_path / "in" / ".." / "x")
    with pytest.raises(ValueError, match="it is a folder"):
        expect_outputs(tmp_path / "in")
    with pytest.raises(ValueError, match="device or a pipe"):
        expect_outputs(Path(os.devnull))
    with pytest.raises(ValueError, match="create it first"):
        expect_outputs(tmp_path / "none" / "x")
    with pytest.raises(ValueError, match="choose another name"):
        expect_not_an_input(tmp_path / "in", tmp_path / "in")


def test_the_prompt_on_stdin_is_an_input(model, tmp_path, run, monkeypatch):
    import sys

    (tmp_path / "prompt.txt").write_text("abc")
    keep = os.dup(0)
    try:
        with (tmp_path / "prompt.txt").open("rb") as stream:
            os.dup2(stream.fileno(), 0)
            monkeypatch.setattr(sys, "stdin", stream)
            assert run("generate", model, "--prompt", "-", "--json", tmp_path / "prompt.txt") == 2
    finally:
        os.dup2(keep, 0)
        os.close(keep)
    assert (tmp_path / "prompt.txt").read_text() == "abc"
