"""--from: training continues with the weights of a checkpoint of any family, and the export goes back."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

import moe
from experiments.train.corpus import BatchOrder, windows
from experiments.train.description.description import described
from experiments.train.description.starting import settings_of, tokenizer_of
from experiments.train.torch_run import build, train, train_step

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
SIZES |= {"pad_token_id": None, "initializer_range": 0.2}
MIXTURE = {"num_experts_per_tok": 2}
FAMILIES = {
    "olmoe": ("Olmoe", {**MIXTURE, "intermediate_size": 24, "num_experts": 6}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**MIXTURE, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 6, "mlp_only_layers": [0]},
    ),
    "mixtral": ("Mixtral", {**MIXTURE, "intermediate_size": 24, "num_local_experts": 6, "sliding_window": None}),
    "llama": ("Llama", {"intermediate_size": 48, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"intermediate_size": 48, "head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2", {"intermediate_size": 48}),
    "qwen3": ("Qwen3", {"intermediate_size": 48, "head_dim": 8}),
}


@pytest.fixture
def source(request, tmp_path):
    """A random model of a family, with biases that are not 0, and the folder that it was saved in."""
    name, extra = FAMILIES[request.param]
    config = getattr(transformers, f"{name}Config")(**SIZES, **extra)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in (p for name, p in model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    return SimpleNamespace(family=request.param, model=model, folder=tmp_path / "source")


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_the_first_loss_is_the_sources_and_the_export_goes_back(source, tmp_path, corpus, tiny_training):
    config = replace(tiny_training, model=settings_of(source.folder), start_from=str(source.folder), steps=2)
    model, optimizer, order = build(config, corpus, torch.device("cpu"))
    loss = 0.0
    with torch.no_grad():
        for micro in range(config.accumulation):
            token_BS = torch.from_numpy(order.batch(micro))
            loss += source.model(token_BS, labels=token_BS).loss.item() / config.accumulation
    assert train_step(model, optimizer, order, config, 0)["lm_loss"] == pytest.approx(loss, rel=1e-5)

    train(config, corpus, tmp_path / "run", quiet=True)
    trained = moe.MoEForCausalLM.from_pretrained(tmp_path / "run").eval()
    back = moe.export(trained, source.family)
    assert type(back) is type(source.model)
    token_BS = torch.randint(32, (2, 12))
    with torch.no_grad():
        ours, theirs = trained(token_BS).logits, back(token_BS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, source.model(token_BS).logits, atol=1e-3), "nothing was trained"


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_every_weight_of_a_dense_model_comes_back_bit_by_bit(source):
    back = moe.export(moe.adopt(source.folder), "llama").state_dict()
    assert all(torch.equal(back[name], value) for name, value in source.model.state_dict().items())
    with pytest.raises(ValueError, match="it has 4 experts"):
        moe.export(moe.MoEForCausalLM(moe.MoEConfig(hidden_size=32, num_experts=4, num_hidden_layers=2)), "llama")


def test_a_run_of_ours_goes_on_from_another_with_its_bytes_as_tokens(run, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    begin = ("train", "--preset", "smoke", "--steps", "2", "--data", text)
    assert run(*begin, "--out", tmp_path / "a") == 0
    assert tokenizer_of(tmp_path / "a", {}) is None
    options = ("--from", tmp_path / "a", "--set", "warmup_steps=0", "--set", "model.balance_loss_weight=0.02")
    assert run(*begin, *options, "--out", tmp_path / "b") == 0
    rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("a", "b")]
    assert rows[1]["lm_loss"] < rows[0]["lm_loss"] - 0.05
    assert run("train", "--config", tmp_path / "b/run.yaml", "--out", tmp_path / "c") == 0
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()
    capfd.readouterr()
    for wrong, message in (
        (("--set", "model.num_experts=4"), "does not fit this model"),
        (("--params", "1M"), "leave --params and --active out"),
    ):
        assert run(*begin, "--from", tmp_path / "a", *wrong, "--out", tmp_path / "d") == 2
        assert message in capfd.readouterr().err
    assert run(*begin, "--from", tmp_path / "none", "--out", tmp_path / "d") == 2
    assert "no config.json" in capfd.readouterr().err


def test_what_cannot_be_expressed_and_what_has_no_tokenizer_is_said(tmp_path, corpus, tiny_training):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=48, attention_bias=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="it has biases"):
        described(options={"start_from": str(tmp_path / "biased")})
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=48)).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match="has no tokenizer"):
        described(options={"start_from": str(tmp_path / "a")})
    large = replace(corpus, vocab_size=97)
    config = replace(tiny_training, model=settings_of(tmp_path / "a"), start_from=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="read as 97 tokens, the model knows 96"):
        build(config, large, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_jax_starts_from_the_same_weights(source, tmp_path, corpus, tiny_training):
    pytest.importorskip("jax")
    from experiments.train import jax_run

    model = settings_of(source.folder) | {"num_dense_layers": 1}
    config = replace(tiny_training, model=model, start_from=str(source.folder), backend="jax", accumulation=1)
    row = jax_run.build(config, corpus, tmp_path).step(0)
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)
    token_BS = torch.from_numpy(order.batch(0))
    with torch.no_grad():
        loss = source.model(token_BS, labels=token_BS).loss.item()
    assert row["lm_loss"] == pytest.approx(loss, rel=1e-4)
