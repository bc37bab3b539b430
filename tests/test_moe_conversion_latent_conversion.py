import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig

import moe.cli
import offload
from moe import MoEForCausalLM
from moe.conversion.export import export
from moe.conversion.factorise import Whitening, factorise, truncate
from moe.conversion.families import config_of_moe
from moe.conversion.latent_conversion import LatentPlan, convert_to_latent

FAMILIES = {
    "olmoe": {"qk_norm": "full", "router": "olmoe"},
    "qwen3_moe": {"qk_norm": "head", "router": "qwen3_moe", "num_dense_layers": 1},
    "mixtral": {"qk_norm": "none", "router": "mixtral", "tie_word_embeddings": True},
    "ours": {"router": "rmoe", "num_shared_experts": 1, "zero_compute_experts": ["copy", "zero"]},
}


def trained(tiny_config, family, folder, **overrides):
    """A checkpoint folder of that family with random weights, and our own model with the same ones."""
    model = MoEForCausalLM(tiny_config(vocab_size=256, **(FAMILIES[family] | overrides))).eval()
    saved = model if family == "ours" else export(model, family)
    saved.save_pretrained(folder)
    return model


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and back again. " * 20)
    return file


@pytest.mark.parametrize(("rows", "rank"), [(5, 3), (5, 12), (40, 7)])
def test_error_is_the_tail_of_singular_values(rows, rank):
    matrix_EFD = torch.randn(4, rows, 16)
    factors = factorise(matrix_EFD, rank)
    singular = torch.linalg.svdvals(matrix_EFD.double().flatten(0, 1))
    expected = float(singular[rank:].square().sum())
    product = factors.left @ factors.basis
    assert factors.error == pytest.approx(float((matrix_EFD.double() - product).square().sum()), abs=1e-10)
    assert factors.error == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert factors.tail == pytest.approx(expected, rel=1e-9, abs=1e-10)
    torch.testing.assert_close(factors.basis @ factors.basis.T, torch.eye(rank).double())


def test_no_other_basis_does_better():
    matrix_EFD = torch.randn(3, 6, 10).double()
    best = factorise(matrix_EFD, 4).error
    for _ in range(50):
        basis, _ = torch.linalg.qr(torch.randn(10, 4).double())
        assert float((matrix_EFD - matrix_EFD @ basis @ basis.T).square().sum()) >= best


def test_full_rank_is_exact_to_the_bit():
    matrix_EFD = torch.randn(3, 6, 10).bfloat16()
    for whitening in (None, Whitening.of(torch.randn(10, 10) @ torch.randn(10, 10).T + 20 * torch.eye(10))):
        factors = factorise(matrix_EFD, 10, whitening=whitening)
        assert torch.equal((factors.left @ factors.basis).bfloat16(), matrix_EFD)


@pytest.mark.parametrize("rows", [4, 20])
def test_each_matrix_is_truncated_by_its_own_singular_values(rows):
    matrix_EFD = torch.randn(3, rows, 10).double()
    kept, tail = truncate(matrix_EFD, 3)
    singular = torch.linalg.svdvals(matrix_EFD)
    assert (torch.linalg.matrix_rank(kept) == 3).all()
    assert tail == pytest.approx(float(singular[:, 3:].square().sum()))
    assert float((matrix_EFD - kept).square().sum()) == pytest.approx(tail)


def test_whitening_minimises_the_error_on_the_inputs():
    x_TD = torch.randn(200, 10).double() * torch.logspace(-2, 0, 10)
    matrix_EFD = torch.randn(3, 6, 10).double()
    whitening = Whitening.of(x_TD.T @ x_TD, ridge=0.0)

    def output_error(factors):
        difference = matrix_EFD - factors.left @ factors.basis
        return float((x_TD @ difference.flatten(0, 1).T).square().sum())

    white, plain = factorise(matrix_EFD, 4, whitening=whitening), factorise(matrix_EFD, 4)
    assert output_error(white) < output_error(plain)
    scale = float((x_TD.T @ x_TD).diagonal().mean())
    assert output_error(white) == pytest.approx(white.tail * scale, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_conversion_keeps_every_logit(tiny_config, tmp_path, family):
    model = trained(tiny_config, family, tmp_path / "in")
    report = convert_to_latent(tmp_path / "in", tmp_path / "out", LatentPlan(group=4, rank=32))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    token_BS = torch.randint(256, (2, 9))
    torch.testing.assert_close(converted(token_BS).logits, model(token_BS).logits, atol=1e-5, rtol=1e-4)
    assert report["error_squared"] == report["tail_squared"] == 0.0


def test_report_gives_the_tail_and_the_losses_of_the_models_themselves(tiny_config, tmp_path, text):
    trained(tiny_config, "olmoe", tmp_path / "in")
    plan = LatentPlan(group=3, rank=6, expert_rank=12, data=text, tokens=600)
    report = convert_to_latent(tmp_path / "in", tmp_path / "out", plan)
    assert report["error_squared"] == pytest.approx(report["tail_squared"], rel=1e-9)
    assert report["truncation_error_squared"] == pytest.approx(report["truncation_tail_squared"], rel=1e-9)
    token_BS = torch.tensor(list(text.read_bytes())[:512])[None]
    for folder, name in (("in", "loss_before"), ("out", "loss_after")):
        native = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert report[name] == pytest.approx(native(token_BS, labels=token_BS).loss.item(), rel=1e-5)
    assert report["loss_after"] != report["loss_before"]


def test_whitened_conversion_uses_the_inputs_of_each_layer(tiny_config, tmp_path, text):
    model = trained(tiny_config, "mixtral", tmp_path / "in")
    plan = LatentPlan(group=6, rank=5, whiten=text, tokens=300)
    report = convert_to_latent(tmp_path / "in", tmp_path / "out", plan)
    seen = []
    experts = model.model.moe_layers[1].experts
    experts.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(torch.tensor(list(text.read_bytes())[:300])[None])
    x_TD = seen[0].detach().double()
    root_DD = Whitening.of(x_TD.T @ x_TD).root_DD
    gate_EFD = experts.gate_up_proj.detach().double()[:, :24]
    singular = torch.linalg.svdvals((gate_EFD @ root_DD).flatten(0, 1))
    assert report["layers"][1]["gate"]["tail_squared"] == pytest.approx(float(singular[5:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("slots", [1, 6])
def test_converted_checkpoint_generates_under_offload(tiny_config, tmp_path, slots):
    trained(tiny_config, "qwen3_moe", tmp_path / "in")
    convert_to_latent(tmp_path / "in", tmp_path / "out", LatentPlan(group=2, rank=8))
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    loaded = offload.load(tmp_path / "out", cache_experts=slots)
    token_BS = torch.randint(256, (1, 7))
    with torch.no_grad():
        assert torch.equal(loaded(token_BS).logits, resident(token_BS).logits)
    assert loaded.generate(token_BS, max_new_tokens=3).shape == (1, 10)


def test_bfloat16_shards_stay_bfloat16(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config(vocab_size=256)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    convert_to_latent(tmp_path / "in", tmp_path / "out", LatentPlan(group=2, rank=8))
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()} == {torch.bfloat16}


def test_command_reports_and_refuses_what_exists(tiny_config, tmp_path, text):
    trained(tiny_config, "ours", tmp_path / "in")
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["convert", str(tmp_path / "in"), "--to", "latent", "--group", "2", "--rank", "4", "--out", str(out)]
    moe.cli.app([*arguments, "--data", str(text), "--json", str(report)], standalone_mode=False)
    assert json.loads(report.read_text())["loss_after"] > 0
    with pytest.raises(ValueError, match="exists already"):
        moe.cli.app(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2MoeConfig(), "its shared experts are of another kind"),
        (OlmoeConfig(attention_bias=True), "it has biases"),
        (OlmoeConfig(clip_qkv=8.0), "clips"),
        (OlmoeConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "scaled"),
        (LlamaConfig(), "known mixture-of-experts families are olmoe, qwen3_moe, mixtral"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        config_of_moe(config)


def test_nothing_is_left_behind_after_a_failure(tiny_config, tmp_path):
    trained(tiny_config, "olmoe", tmp_path / "in")
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.32"):
        convert_to_latent(tmp_path / "in", tmp_path / "out", LatentPlan(group=2, rank=33))
    (tmp_path / "in" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not json at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        convert_to_latent(tmp_path / "in", tmp_path / "out", LatentPlan(group=2, rank=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_tensors_without_a_place_are_refused(tmp_path):
    config = OlmoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_experts=2,
        num_experts_per_tok=1, attention_bias=True, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "in")
    settings = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings | {"attention_bias": False}))
    with pytest.raises(ValueError, match=r"no place in the model.*bias"):
        convert_to_latent(tmp_path / "in", tmp_path / "out", LatentPlan(group=2, rank=8))
