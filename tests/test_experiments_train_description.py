"""A run is a file: merged from presets, files and options, checked, solved for sizes, saved, repeated bit by bit."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from experiments.train.description.config import TrainConfig
from experiments.train.description.description import (
    ASKED,
    SETTINGS,
    TEXT_KEYS,
    RunDescription,
    described,
    run_size,
)
from experiments.train.description.rate_laws import RunSize, ling_law, step_law
from experiments.train.description.settings_file import assigned, merged, read_settings
from experiments.train.description.sizes import Shape, parse_count, solved_shape
from experiments.train.fitting import model_sizes
from experiments.train.presets import PRESETS, preset, with_steps
from experiments.train.schedule import SCHEDULES, learning_rate
from moe import MoEConfig, MoEForCausalLM


def write(path, text):
    path.write_text(text)
    return path


def test_options_come_before_the_file_and_the_file_before_its_parent(tmp_path):
    file = write(tmp_path / "a.yaml", "preset: smoke\nlearning_rate: 2e-3\nmodel:\n  num_experts: 32\n  head_dim: 16\n")
    run = described(file, ["model.num_experts=64", "batch_size=2"], {"seed": 3, "batch_size": 9, "steps": None})
    assert run.config.model == preset("smoke").model | {"num_experts": 64, "head_dim": 16}
    assert (run.config.learning_rate, run.config.seed, run.config.batch_size) == (2e-3, 3, 2)
    assert run.config.steps == preset("smoke").steps


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_that_only_names_its_parent_is_the_preset(name, tmp_path):
    assert described(write(tmp_path / "a.yaml", f"preset: {name}\n")) == RunDescription(
        text=described().text, config=preset(name)
    )


def test_fewer_steps_shorten_the_warm_up_and_another_peak_moves_the_last_rate():
    config = described(options={"preset": "demo"}, settings=["steps=10", "learning_rate=6e-3"]).config
    assert config == replace(with_steps(preset("demo"), 10), learning_rate=6e-3, min_learning_rate=2e-4)
    said = described(options={"preset": "demo"}, settings=["learning_rate=6e-3", "min_learning_rate=1e-5"]).config
    assert said.min_learning_rate == 1e-5


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("lerning_rate: 1", "unknown setting 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("num_experts: 4", "did you mean 'model.num_experts'?"),
        ("model: {num_expert: 4}", "unknown setting 'model.num_expert' (did you mean 'model.num_experts'?)"),
        ("preset: smal", "unknown preset 'smal' (did you mean 'small'?)"),
        ("steps: yes", "steps must be a number; got True"),
        ("steps: 0", "steps must be at least 1; got 0"),
        ("preset: none", "steps is missing; batch_size is missing; sequence_length is missing"),
        ("steps: 2.5", "steps: it should be a valid integer"),
        ("learning_rate: .nan", "learning_rate: it should be"),
        ("learning_rate: fast", "learning_rate: it should be a valid number"),
        ("schedule: cosin", "schedule: it should be 'cosine', 'wsd', 'linear' or 'constant'; got 'cosin'"),
        ("optimizer: sgd", "optimizer: it should be 'adamw' or 'muon'"),
        ("betas: [0.9, 1]", "betas.1: it should be less than 1; got 1"),
        ("warmup_steps: 5000", "never reach its peak"),
        ("min_learning_rate: 1", "is above the peak"),
        ("model: {num_experts: 0}", "model.num_experts: it should be greater than or equal to 1"),
        ("model: {num_experts: four}", "model.num_experts: it should be a valid integer; got 'four'"),
        ("model: {head_dim: 7}", "model.head_dim: it should be a multiple of 2"),
        ("model: {num_experts_per_tok: 99}", "top_k must lie in 1..16"),
        ("model: {router: mixtrol}", "did you mean 'mixtral'"),
        ("model: {router_options: {nope: 1}}", "unknown router option 'nope'"),
        ("model: 3", "expected settings below `model:`"),
        ("mesh: data=2", "mesh is for the backend jax"),
        ("active: 1M", "give params as well"),
        ("params: lots", "expected a number of parameters such as 5M"),
        ("params: 1M\nactive: 2M", "a token cannot visit"),
        ("params: 100K\nactive: 5K", "no shape has 100,000 parameters with 5,000 active; the nearest has"),
        ("router: rmoes", "did you mean 'rmoe'"),
        ("- steps", "expected lines such as"),
        ("steps: 1\nsteps: 2", "'steps' is set twice"),
        ("learning_rate: [1]", "learning_rate: it should be a valid number"),
        ("start_from: 3", "no config.json"),
        ("data: 3", "data: it should be a valid string; got 3"),
        ("steps: [1", "not readable as YAML"),
        ("steps: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_what_cannot_be_meant_is_one_line(said, message, tmp_path):
    with pytest.raises(ValueError, match=r"\w") as refused:
        described(write(tmp_path / "a.yaml", said + "\n"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_missing_or_huge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        described(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="no description of a run"):
        described(write(tmp_path / "a.yaml", "# " + "x" * (1 << 20)))


def test_set_options_go_down_by_dots_and_later_ones_win():
    assert assigned(["a.b.c=1", "a.b.d=[2, x]", "e=1e-3", "e=2e-3"]) == {"a": {"b": {"c": 1, "d": [2, "x"]}}, "e": 2e-3}
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}
    for wrong in ("a", "=1", "a..b=1", "a=[1"):
        with pytest.raises(ValueError, match="--set"):
            assigned([wrong])
    with pytest.raises(ValueError, match="nothing goes below it"):
        assigned(["a=1", "a.b=2"])


@pytest.mark.parametrize("name", ["smoke", "demo", "chains", "e64"])
def test_the_formula_counts_what_a_model_that_was_built_has(name):
    config = MoEConfig(**preset(name).model)
    shape = Shape(**{field: getattr(config, field) for field in Shape.__dataclass_fields__})
    sizes = model_sizes(preset(name).model)
    assert shape.parameters(vars(config)) == (sizes["parameters"], sizes["active_parameters"])


@pytest.mark.parametrize(("total", "active"), [("5M", "1M"), ("400K", "150K"), ("40M", None)])
def test_a_solved_shape_has_the_parameters_that_were_asked_for(total, active):
    run = described(options={"preset": "small", "params": total, "active": active})
    sizes = model_sizes(run.config.model)
    assert sizes["parameters"] == pytest.approx(parse_count(total), rel=0.05)
    if active:
        assert sizes["active_parameters"] == pytest.approx(parse_count(active), rel=0.05)
    (note,) = run.notes
    assert f"{sizes['parameters'] / 1e6:.2f} M parameters" in note


def test_sizes_that_are_given_stay():
    run = described(None, ["model.num_experts=32", "model.hidden_size=96"], {"params": "3M", "active": "600K"})
    assert (run.config.model["num_experts"], run.config.model["hidden_size"]) == (32, 96)
    rest = {**{f.name: getattr(MoEConfig, f.name) for f in MoEConfig.__dataclass_fields__.values()}}
    with pytest.raises(ValueError, match="num_experts 4"):
        solved_shape(5e6, 1e5, rest, {"num_experts": 4})


def test_the_laws_give_what_their_papers_do():
    size = RunSize(parameters=1e9, tokens=1e11, flops_per_token=2e9)
    assert step_law(size).learning_rate == pytest.approx(1.79 * 10 ** (-9 * 0.713 + 11 * 0.307))
    assert step_law(size).batch_tokens == pytest.approx(0.58 * 10 ** (11 * 0.571))
    assert ling_law(size).learning_rate == pytest.approx(1.1576 * 2e20**-0.1529)
    assert ling_law(size).batch_tokens == pytest.approx(0.0694 * 2e20**0.3644)
    # the figures of the reference table for a model of this project's size
    tiny = RunSize(parameters=0.5e6, tokens=4e6, flops_per_token=1e6)
    assert step_law(tiny).learning_rate == pytest.approx(0.0165, rel=0.02)
    assert step_law(tiny).batch_tokens == pytest.approx(3.4e3, rel=0.02)
    with pytest.raises(ValueError, match="tokens must be a positive number"):
        RunSize(parameters=1.0, tokens=0.0, flops_per_token=1.0)


def test_a_rate_can_be_a_laws_name():
    run = described(options={"preset": "smoke"}, settings=["learning_rate=step_law"])
    size = run_size(run.config)
    assert run.config.learning_rate == step_law(size).learning_rate
    assert size.tokens == 40 * 8 * 64
    assert size.parameters == model_sizes(run.config.model)["parameters"] - 2 * 256 * 64
    assert "step_law: learning rate" in run.notes[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_its_peak_and_ends_where_it_says(name):
    config = TrainConfig(
        steps=10,
        batch_size=1,
        sequence_length=2,
        warmup_steps=2,
        learning_rate=1.0,
        min_learning_rate=0.5,
        schedule=name,
    )
    rates = [learning_rate(config, step) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[10] == pytest.approx(1.0 if name == "constant" else 0.5)
    middle = {"cosine": 0.75, "linear": 0.75, "constant": 1.0, "wsd": 1.0}
    assert rates[6] == pytest.approx(middle[name])


def test_a_finished_runs_file_repeats_it_bit_by_bit(run, tmp_path, capfd):
    text = write(tmp_path / "text.txt", "the quick brown fox jumps over the lazy dog\n" * 400)
    file = write(
        tmp_path / "a.yaml",
        f"preset: smoke\nprecision: float32\nsteps: 3\ndata: {text}\noptimizer: muon\nschedule: wsd\n",
    )
    options = ("--set", "model.num_experts=4", "--set", "accumulation=2", "--seed", "5", "--router", "rmoe")
    assert run("train", "--config", file, "--out", tmp_path / "a", *options) == 0
    saved = tmp_path / "a/run.yaml"
    assert run("train", "--config", saved, "--out", tmp_path / "b") == 0
    assert saved.read_bytes() == (tmp_path / "b/run.yaml").read_bytes()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/run.html").is_file()
    found = yaml.safe_load(saved.read_text())
    assert found["model"]["router"] == "rmoe"
    assert asdict(described(saved).config) == asdict(TrainConfig(**{
        name: value for name, value in found.items() if name in TrainConfig.__dataclass_fields__
    }))  # fmt: skip
    assert read_settings(saved) == found

    assert run("train", "--config", saved, "--resume", "--out", tmp_path / "a") == 0
    assert run("train", "--config", saved, "--set", "learning_rate=1e-3", "--resume", "--out", tmp_path / "a") == 2
    assert "learning_rate 0.003 there and 0.001 now" in capfd.readouterr().err
    text.write_text("another text, which is as long as it has to be\n" * 400)
    assert run("train", "--config", saved, "--out", tmp_path / "c") == 2
    assert "is not the text of this description" in capfd.readouterr().err
    assert not (tmp_path / "c/run.yaml").exists()


def test_the_page_explains_every_setting():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z_, ]+) \| ", page, re.M)
    explained = {name for row in rows for name in row.split(", ")}
    assert {*SETTINGS, *ASKED, *TEXT_KEYS, "model"} <= explained


def test_a_models_defaults_are_those_of_its_class():
    model = MoEForCausalLM(MoEConfig(**described(None, [], {"preset": "smoke"}).config.model))
    assert sum(p.numel() for p in model.parameters()) == model_sizes(preset("smoke").model)["parameters"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
