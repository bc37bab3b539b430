"""Null experts that change no first loss, and pre-gates fitted by regression, for every family that we can express."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from moe import MoEForCausalLM, save_byte_tokenizer
from moe.conversion.export import export
from moe.conversion.gates.nulls import NullPlan, add_nulls
from moe.conversion.gates.pregates import PreGatePlan, add_pregates, quality, regression

E, K = 6, 2
FAMILIES = {
    "olmoe": {"qk_norm": "full", "router": "olmoe"},
    "qwen3_moe": {"qk_norm": "head", "router": "qwen3_moe", "num_dense_layers": 1},
    "mixtral": {"qk_norm": "none", "router": "mixtral", "tie_word_embeddings": True},
    "ours": {"router": "classic", "router_options": {"scale": 2.0}, "num_shared_experts": 1},
}
TOKENS = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=FAMILIES)
def saved(request, tiny_config, tmp_path):
    """A checkpoint folder of that family, and our own model with the same weights."""
    model = MoEForCausalLM(tiny_config(vocab_size=256, eos_token_id=0, **FAMILIES[request.param])).eval()
    (model if request.param == "ours" else export(model, request.param)).save_pretrained(tmp_path / "before")
    save_byte_tokenizer(tmp_path / "before")
    return tmp_path / "before", model


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog, and back again it goes. " * 200)
    return file


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("nulls", "top_k", "is_same_anywhere"), [(12, 6, True), (6, 3, False)])
def test_nulls_change_no_logit(saved, nulls, top_k, is_same_anywhere, tmp_path):
    """(6, 3) is the paper's (8, 3) at E = 6: one null per expert, and one choice more than K."""
    folder, model = saved
    report = add_nulls(folder, tmp_path / "after", NullPlan(nulls=nulls, top_k=top_k))
    after = loaded(tmp_path / "after")
    torch.testing.assert_close(logits(after), logits(model), atol=1e-5, rtol=1e-4)
    assert after.config.zero_compute_experts == ["zero"] * nulls
    assert after.config.num_experts_per_tok == top_k
    assert (report["first_loss_unchanged"], report["first_loss_unchanged_on_cpu"]) == (is_same_anywhere, True)
    with torch.no_grad():
        stats = after(TOKENS).router_stats
    assert all(float(one.true_load) == K for one in stats)
    assert report["balanced_load"] == pytest.approx(E * top_k / (E + nulls))


@pytest.mark.parametrize("saved", ["mixtral"], indirect=True)
def test_fewer_choices_change_the_loss_and_the_report_says_so(saved, tmp_path, text):
    folder, model = saved
    wider = add_nulls(folder, tmp_path / "wider", NullPlan(nulls=12, top_k=4))  # the paper's (16, 4)
    assert wider["first_loss_unchanged_on_cpu"]
    torch.testing.assert_close(logits(loaded(tmp_path / "wider")), logits(model), atol=1e-5, rtol=1e-4)
    report = add_nulls(folder, tmp_path / "after", NullPlan(top_k=2, data=text, tokens=512))
    assert not report["first_loss_unchanged"]
    assert not report["first_loss_unchanged_on_cpu"]
    assert abs(report["loss_after"] - report["loss_before"]) > 1e-3
    assert float((logits(loaded(tmp_path / "after")) - logits(model)).abs().max()) > 1e-2
    same = add_nulls(folder, tmp_path / "same", NullPlan(data=text, tokens=512))
    assert same["loss_after"] == pytest.approx(same["loss_before"], abs=1e-5)


@pytest.mark.parametrize("saved", ["mixtral", "olmoe"], indirect=True)
def test_null_rows_get_the_gradient_of_the_balance_loss_alone(saved, tmp_path):
    """Where weights count FFN experts only; raw softmax weights see nulls in their sum."""
    folder, model = saved
    add_nulls(folder, tmp_path / "after", NullPlan())
    after = loaded(tmp_path / "after")
    after(TOKENS, labels=TOKENS).lm_loss.backward()
    model(TOKENS, labels=TOKENS).lm_loss.backward()
    name = f"model.layers.{model.config.num_dense_layers}.mlp.experts.down_proj"
    torch.testing.assert_close(after.get_parameter(name).grad, model.get_parameter(name).grad, atol=1e-6, rtol=1e-3)
    rows = [router.weight.grad for router in after.model.routers]
    is_silent = [not row[E:].any() for row in rows]
    assert all(is_silent) if after.config.router == "adamoe" else not any(is_silent)
    after.train()
    after.zero_grad()
    output = after(TOKENS, labels=TOKENS)
    (output.loss - output.lm_loss).backward()
    assert all(router.weight.grad[E:].abs().max() > 0 for router in after.model.routers)


def test_training_with_nulls_lowers_the_load_of_experts(tiny_config, tmp_path):
    """The balance loss counts nulls: after some steps tokens visit fewer experts, and not all equally many."""
    torch.manual_seed(0)
    MoEForCausalLM(tiny_config(router="mixtral", vocab_size=256)).save_pretrained(tmp_path / "before")
    add_nulls(tmp_path / "before", tmp_path / "after", NullPlan(nulls=12, top_k=4))
    model = loaded(tmp_path / "after").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(30):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = model.eval()(TOKENS).router_stats
    load = sum(float(one.true_load) for one in stats) / len(stats)
    assert load < K - 0.2, f"balanced it would be {E * 4 / 18:.2f}"


def test_ridge_regression_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    input_TD, weight_RD = (
        torch.randn(50, 4, generator=generator).double(),
        torch.randn(3, 4, generator=generator).double(),
    )
    torch.testing.assert_close(regression(input_TD, input_TD @ weight_RD.T, 0.0), weight_RD)
    x, z = input_TD.numpy(), torch.randn(50, 3, generator=generator).double().numpy()
    penalty = 0.5 * np.trace(x.T @ x) / 4
    expected = np.linalg.solve(x.T @ x + penalty * np.eye(4), x.T @ z).T
    torch.testing.assert_close(regression(input_TD, torch.from_numpy(z), 0.5), torch.from_numpy(expected))
    few_TD = input_TD[:2]  # fewer tokens than columns: of all that fit, the shortest
    found = regression(few_TD, few_TD @ weight_RD.T, 0.0)
    torch.testing.assert_close(few_TD @ found.T, few_TD @ weight_RD.T)
    assert float(found.norm()) <= float(weight_RD.norm())


def test_quality_by_hand():
    logit_TR = torch.tensor([[3.0, 2.0, -5.0], [-1.0, 0.0, 1.0]]).double()
    predicted_TR = torch.tensor([[3.0, -5.0, 2.0], [-1.0, 0.0, 1.0]]).double()
    found = quality(predicted_TR, logit_TR, 2)
    assert found["agreement"] == 0.75
    assert found["explained_variance"] == pytest.approx(1 - 98 / (2 * 4 + 2 * 1 + 2 * 9))
    assert quality(logit_TR, logit_TR, 1) == {"agreement": 1.0, "explained_variance": 1.0}


def test_pregates_of_layers_that_change_nothing_are_the_gates(tiny_config, tmp_path, text):
    """Attention and experts that write nothing leave every layer the same input, which predicts the gate exactly."""
    model = MoEForCausalLM(tiny_config(vocab_size=256, router="mixtral", hidden_size=16, head_dim=8)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
    model.save_pretrained(tmp_path / "before")
    plan = PreGatePlan(fit=text, ahead=1, ridge=0.0, data=text, tokens=4096)
    report = add_pregates(tmp_path / "before", tmp_path / "after", plan)
    assert report["agreement"] == 1.0
    assert all(layer["explained_variance"] > 1 - 1e-9 for layer in report["layers"])
    assert report["loss_after"] == pytest.approx(report["loss_before"], abs=1e-6)


def test_pregated_models_of_every_family(saved, tmp_path, text):
    folder, model = saved
    L = model.config.num_moe_layers
    ahead = L - 1
    report = add_pregates(folder, tmp_path / "after", PreGatePlan(fit=text, ahead=ahead, tokens=4096))
    assert [layer["layer"] for layer in report["layers"]] == list(range(ahead, L))
    assert report["agreement"] > K / E + 0.1, "better than chance"
    after = loaded(tmp_path / "after")
    assert after.config.router == "pregate"
    assert after.config.router_options["inner"] == model.config.router
    first = [after.model.moe_layers[b].router.own_gate.weight for b in range(ahead)]
    for ours, theirs in zip(first, model.model.routers, strict=False):
        assert torch.equal(ours, theirs.weight)
    for name in (
        "model.embed_tokens.weight",
        f"model.layers.{model.config.num_hidden_layers - 1}.mlp.experts.down_proj",
    ):
        assert torch.equal(after.get_parameter(name), model.get_parameter(name))
    after.train()(TOKENS, labels=TOKENS).lm_loss.backward()
    assert all(layer.router.pre_gate.weight.grad.abs().max() > 0 for layer in after.model.moe_layers[: L - ahead])


def test_a_pregated_model_runs_offloaded(tiny_config, tmp_path, text):
    MoEForCausalLM(tiny_config(vocab_size=256, router="mixtral")).save_pretrained(tmp_path / "before")
    add_pregates(tmp_path / "before", tmp_path / "after", PreGatePlan(fit=text))
    model = offload.load(tmp_path / "after", cache_experts=2)
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path / "after")), atol=1e-5, rtol=1e-4)
    model.offload.close()


def test_other_routers_and_numbers_are_refused(tiny_config, tmp_path, text):
    def folder(**options):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        MoEForCausalLM(tiny_config(vocab_size=256, **options)).save_pretrained(place)
        return place

    plain, out = folder(), tmp_path / "out"
    for plan, message in (
        (NullPlan(nulls=5), "multiple of 6"),
        (NullPlan(top_k=1), r"2\.\.12"),
        (NullPlan(top_k=13), r"2\.\.12"),
    ):
        with pytest.raises(ValueError, match=message):
            add_nulls(plain, out, plan)
    for options, message in (
        ({"router": "rmoe"}, "RecurrentRouter"),
        ({"router": "loss_free"}, "sigmoid scores, a balancing bias"),
        ({"router": "switch"}, "jitter, capacities"),
        ({"zero_compute_experts": ["zero"]}, "zero-compute experts"),
    ):
        with pytest.raises(ValueError, match=message):
            add_nulls(folder(**options), out, NullPlan())
        with pytest.raises(ValueError, match=message):
            add_pregates(folder(**options), out, PreGatePlan(fit=text))
    with pytest.raises(ValueError, match="ahead must lie in"):
        add_pregates(plain, out, PreGatePlan(fit=text, ahead=3))
    with pytest.raises(ValueError, match="one row of tokens"):
        add_pregates(plain, out, PreGatePlan(fit=text, tokens=512))
    assert not out.exists()


def test_the_commands(tiny_config, tmp_path, text, run, capsys):
    MoEForCausalLM(tiny_config(vocab_size=256, router="mixtral", eos_token_id=0)).save_pretrained(tmp_path / "a")
    report = tmp_path / "report.json"
    common = ("--data", text, "--tokens", 1024, "--json", report)
    assert run("convert", tmp_path / "a", "--to", "nulls", "--out", tmp_path / "b", *common) == 0
    facts = json.loads(report.read_text())
    assert facts["first_loss_unchanged"]
    assert "unchanged everywhere" in " ".join(capsys.readouterr().out.split())
    assert run("convert", tmp_path / "a", "--to", "pregate", "--fit", text, "--out", tmp_path / "c", *common) == 0
    assert json.loads(report.read_text())["agreement"] > 0.3
    for folder in "bc":
        assert loaded(tmp_path / folder).generation_config.eos_token_id == 0
        assert (tmp_path / folder / "tokenizer.json").is_file()
    capsys.readouterr()
    for arguments, message in (
        (("--to", "pregate"), "--fit"),
        (("--to", "nulls", "--rank", 2), "an option of --to latent"),
        (("--to", "latent"), "--group and --rank"),
        (("--to", "null"), "nulls"),
    ):
        assert run("convert", tmp_path / "a", *arguments, "--out", tmp_path / "d") == 2
        assert message in " ".join(capsys.readouterr().err.split())
