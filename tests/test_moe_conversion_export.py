import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe import ARCHITECTURES, MoEForCausalLM, save_byte_tokenizer
from moe.cli import app
from moe.conversion import export as export_module
from moe.conversion.export import export
from moe.conversion.same_function import TOLERANCE, expect_same_function
from moe.conversion.source import INDEX_NAME, files_of_tensors
from moe.conversion.staging import staged_folder
from routing import ROUTERS

FAMILIES = [
    pytest.param("olmoe", {"qk_norm": "full", "router": "olmoe"}, id="olmoe"),
    pytest.param("olmoe", {"qk_norm": "full", "router": "qwen3_moe", "tie_word_embeddings": True}, id="olmoe-tied"),
    pytest.param("qwen3_moe", {"qk_norm": "head", "router": "qwen3_moe"}, id="qwen3_moe"),
    pytest.param("qwen3_moe", {"router": "olmoe", "num_dense_layers": 1, "head_dim": 16}, id="qwen3_moe-dense-first"),
    pytest.param("mixtral", {"qk_norm": "none", "router": "mixtral"}, id="mixtral"),
]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_exported_checkpoint_gives_the_same_logits_in_transformers_own_class(tiny_config, tmp_path, family, overrides):
    model = MoEForCausalLM(tiny_config(**overrides)).eval()
    export(model, family).save_pretrained(tmp_path / "out")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert native.config.model_type == family
    token_BS = torch.randint(96, (3, 17))
    with torch.no_grad():
        difference = (native(token_BS).logits - model(token_BS).logits).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("mixtral", {"qk_norm": "head", "router": "mixtral"}, "qk_norm must be 'none'"),
        ("mixtral", {"qk_norm": "none", "router": "olmoe"}, "does not renormalise"),
        ("olmoe", {"qk_norm": "full", "num_shared_experts": 1}, "shared experts"),
        ("olmoe", {"qk_norm": "full", "num_dense_layers": 1}, "dense layers"),
        ("olmoe", {"qk_norm": "full", "head_dim": 16}, "head_dim"),
        ("qwen3_moe", {"zero_compute_experts": ["copy"]}, "zero-compute"),
        ("qwen3_moe", {"router": "deepseek_v3"}, "softmax"),
        ("gemma", {}, "unknown family"),
    ],
)
def test_what_a_family_cannot_express_is_refused_with_the_reason(tiny_config, family, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        export(MoEForCausalLM(tiny_config(**overrides)), family)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"moe"}))
def test_architectures_without_an_equal_are_refused_by_name(tiny_config, name):
    model = MoEForCausalLM(tiny_config())
    model.config.architecture = name
    with pytest.raises(ValueError, match=f"the architecture '{name}' has no equal in transformers"):
        export(model, "qwen3_moe")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_exported_as_the_same_function_or_refused(tiny_config, router):
    for family, qk_norm in (("olmoe", "full"), ("qwen3_moe", "head"), ("mixtral", "none")):
        try:
            model = MoEForCausalLM(tiny_config(router=router, qk_norm=qk_norm)).eval()
        except ValueError:
            pytest.skip("does not fit these sizes")
        try:
            exported = export(model, family)
        except ValueError as error:
            if "logits differ" in str(error):
                pytest.fail(f"a router without an equal is to be refused by name: {error}")
            continue
        token_BS = torch.randint(96, (2, 11))
        with torch.no_grad():
            torch.testing.assert_close(exported(token_BS).logits, model(token_BS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["weight", "norm", "theta"])
def test_a_difference_in_function_refuses_the_export(tiny_config, monkeypatch, dtype, fault):
    """Names and shapes agree in each of these; only logits tell."""
    model = MoEForCausalLM(tiny_config(router="qwen3_moe")).to(dtype).eval()
    export(model, "qwen3_moe")
    if fault == "theta":
        monkeypatch.setattr(type(model.config), "rope_theta", 10_000.0)
        true = export_module._shared_fields
        wrong = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}
        monkeypatch.setattr(export_module, "_shared_fields", lambda config: true(config) | wrong)
    elif fault == "norm":
        monkeypatch.setattr(export_module, "_is_renormalised", lambda rule: False)
    else:
        swapped = export_module._renamed

        def exchange(state):
            state = swapped(state)
            name = "model.layers.1.mlp.experts.down_proj"
            return state | {name: state[name].flip(0)}

        monkeypatch.setattr(export_module, "_renamed", exchange)
    with pytest.raises(ValueError, match="does not compute what the source computes"):
        export(model, "qwen3_moe")


def test_logits_that_are_not_finite_are_no_equality(tiny_config):
    models = [MoEForCausalLM(tiny_config()).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    expect_same_function(*models, "the copy")
    with torch.no_grad():
        models[1].model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits differ by nan"):
        expect_same_function(*models, "the copy")
    assert TOLERANCE <= 1e-4


def test_the_command_takes_tokenizer_and_generation_settings_along(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(vocab_size=256, eos_token_id=0))
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "a")
    save_byte_tokenizer(tmp_path / "a")
    app(["export", str(tmp_path / "a"), "--to", "qwen3_moe", "--out", str(tmp_path / "b")], standalone_mode=False)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert (native.config.eos_token_id, native.generation_config.temperature) == (0, 0.5)
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("héllo")["input_ids"] == list("héllo".encode())


def test_an_older_byte_model_gets_its_tokenizer_with_the_export(tiny_config, tmp_path):
    MoEForCausalLM(tiny_config(vocab_size=256)).save_pretrained(tmp_path / "a")
    app(["export", str(tmp_path / "a"), "--to", "qwen3_moe", "--out", str(tmp_path / "b")], standalone_mode=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("abc")["input_ids"] == [97, 98, 99]


def test_unknown_families_are_refused_with_the_nearest_name_before_the_model_is_read(tiny_config, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unknown family 'qwen3' \(did you mean 'qwen3_moe'"):
        app(["export", str(tmp_path / "a"), "--to", "qwen3", "--out", str(tmp_path / "b")], standalone_mode=False)


def test_an_interrupted_export_ends_with_130(tiny_config, tmp_path, run, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    MoEForCausalLM(tiny_config(vocab_size=256)).save_pretrained(tmp_path / "a")
    monkeypatch.setattr(export_module, "export", interrupt)
    assert run("export", tmp_path / "a", "--to", "qwen3_moe", "--out", tmp_path / "b") == 130
    assert "interrupted" in capsys.readouterr().err


CODE = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}


@pytest.mark.parametrize(
    "command",
    [
        ["export", "own", "--to", "qwen3_moe"],
        ["convert", "own", "--to", "latent", "--group", "2", "--rank", "4"],
        ["refactor", "own", "--data", "t.txt", "--data", "t.txt"],
        ["prune", "own", "--keep", "2"],
        ["join", "own", "own"],
    ],
)
def test_code_in_the_folder_is_never_run(tmp_path, run, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text(json.dumps(CODE))
    (tmp_path / "own/code.py").write_text("raise SystemExit('the code has run')")
    (tmp_path / "t.txt").write_text("a text " * 200)
    assert run(*command, "--out", "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "model type 'own' is Python code in the folder, which is never run" in said


def test_one_file_wins_over_a_stale_index(tmp_path):
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "gone-00001-of-00001.safetensors"}}')
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert files_of_tensors(tmp_path) == {"b": tmp_path / "model.safetensors"}


def test_a_folder_appears_whole_or_not_and_leftovers_of_a_kill_go(tmp_path):
    left, others = tmp_path / ".b.unfinished-x", tmp_path / ".b.backup"
    for folder in (left, others):
        folder.mkdir()
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "b") as folder:
        (folder / "config.json").write_text(str(1 / 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.backup"]
    with staged_folder(tmp_path / "b") as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["config.json"]
