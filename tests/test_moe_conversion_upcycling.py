"""Upcycling: the dense model's logits from every family, hand-computed experts, what differs, and refusals."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import offload
from moe import save_byte_tokenizer
from moe.conversion.tensor_files import PlannedTensor, write_tensors
from moe.conversion.upcycling.copies import Copies, Difference, restarted
from moe.conversion.upcycling.upcycle import UpcyclePlan, upcycle

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 7,
}
DENSE = {
    "llama": LlamaConfig(**SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "scaled": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
}
CASES = [
    ("llama", "auto", 3, "mixtral"),
    ("llama", "expertier", 1, "expertier"),
    ("tied", "auto", 1, "mixtral"),
    ("tied", "expertier", 3, "expertier"),
    ("scaled", "auto", 1, "mixtral"),
    ("mistral", "auto", 3, "mixtral"),
    ("qwen2", "auto", 3, "qwen2_moe"),
    ("qwen2", "expertier", 1, "expertier"),
    ("qwen3", "auto", 1, "qwen3_moe"),
]
TOKENS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder and model by name; norms and biases are random, so that a lost one is seen."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(DENSE[name]).eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data.normal_(1, 0.2)
            folder = tmp_path_factory.mktemp(name) / "dense"
            model.save_pretrained(folder)
            save_byte_tokenizer(folder)
            made[name] = folder, model
        return made[name]

    return make


def plan(**changes):
    return UpcyclePlan(**({"copies": 4, "top_k": 2} | changes))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def loss_and_logits(model):
    with torch.no_grad():
        output = model(TOKENS, labels=TOKENS)
    loss = getattr(output, "lm_loss", None)  # ours adds balance losses to `loss` in training
    return output.loss if loss is None else loss, output.logits


@pytest.mark.parametrize(("name", "to", "granularity", "family"), CASES)
def test_the_first_loss_is_the_dense_models(dense, name, to, granularity, family, tmp_path):
    folder, model = dense(name)
    report = upcycle(folder, tmp_path / "up", plan(granularity=granularity, to=to))
    up = loaded(tmp_path / "up")
    assert up.config.model_type == report["family"] == family
    (loss, logits), (expected, dense_logits) = loss_and_logits(up), loss_and_logits(model)
    assert abs(float(loss - expected)) < 1e-5
    torch.testing.assert_close(logits, dense_logits, atol=1e-5, rtol=1e-4)
    assert report["parameters"] == sum(p.numel() for p in up.parameters())
    assert report["dense_parameters"] == sum(p.numel() for p in model.parameters())
    assert (report["num_experts"], report["num_experts_per_tok"]) == (4 * granularity, 2 * granularity)
    assert report["expert_width"] == 48 // granularity
    assert report["computes_the_same"]


def test_experts_are_shards_of_copies_with_scaled_outputs(dense, tmp_path):
    """Expert 5 of granularity 2 is the second half of copy 2, its outputs doubled; shards share a router row."""
    folder, model = dense("qwen3")
    upcycle(folder, tmp_path / "up", plan(granularity=2))
    mlp = model.model.layers[1].mlp
    with safe_open(tmp_path / "up/model.safetensors", "pt") as file:
        prefix = "model.layers.1.mlp."
        assert torch.equal(file.get_tensor(f"{prefix}experts.5.gate_proj.weight"), mlp.gate_proj.weight[24:])
        assert torch.equal(file.get_tensor(f"{prefix}experts.4.up_proj.weight"), mlp.up_proj.weight[:24])
        assert torch.equal(file.get_tensor(f"{prefix}experts.5.down_proj.weight"), 2 * mlp.down_proj.weight[:, 24:])
        rows = file.get_tensor(f"{prefix}gate.weight")
    assert torch.equal(rows[0::2], rows[1::2])
    assert len(rows[0::2].unique(dim=0)) == 4
    assert 0.005 < float(rows.std()) < 0.04


@pytest.mark.parametrize(("to", "granularity"), [("auto", 3), ("expertier", 1)])
def test_gradients_of_the_backbone_are_the_dense_models_and_experts_share_theirs(dense, to, granularity, tmp_path):
    folder, model = dense("llama")
    upcycle(folder, tmp_path / "up", plan(copies=2, top_k=2, granularity=granularity, to=to))
    up = loaded(tmp_path / "up")
    for one in (model, up):
        one.zero_grad()
        output = one(TOKENS, labels=TOKENS)
        (output.loss if getattr(output, "lm_loss", None) is None else output.lm_loss).backward()
    ours, theirs = dict(up.named_parameters()), dict(model.named_parameters())
    shared = [name for name in ours if name in theirs]
    assert len(shared) > 10
    for name in shared:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-6, rtol=1e-3)
    # a copy is G times a shard and weighs 1 / G, summed over copies
    gradient_EDF = ours["model.layers.0.mlp.experts.down_proj"].grad
    whole_DF = torch.cat(list(gradient_EDF.unflatten(0, (2, granularity)).sum(dim=0)), dim=-1)
    expected_DF = theirs["model.layers.0.mlp.down_proj.weight"].grad / granularity
    torch.testing.assert_close(whole_DF, expected_DF, atol=1e-6, rtol=1e-3)
    model.zero_grad()


def test_a_seed_repeats_and_another_gives_other_routers_and_noise(dense, tmp_path):
    folder, _ = dense("llama")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(folder, tmp_path / name, plan(seed=seed, noise=0.1, drop=0.25))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_dropped_channels_start_anew_with_the_statistics_of_the_old(dense, tmp_path):
    folder, model = dense("llama")
    report = upcycle(folder, tmp_path / "up", plan(drop=0.5))
    assert not report["computes_the_same"]
    experts = loaded(tmp_path / "up").model.layers[0].mlp.experts
    gate_FD, up_FD, down_DF = (
        getattr(model.model.layers[0].mlp, f"{kind}_proj").weight for kind in ("gate", "up", "down")
    )
    chosen = []
    for expert in range(4):
        found = experts.gate_up_proj[expert].chunk(2)
        is_new_F = (found[0] != gate_FD).all(dim=1)
        assert int(is_new_F.sum()) == 24
        assert torch.equal((found[1] != up_FD).all(dim=1), is_new_F)
        assert torch.equal((experts.down_proj[expert] != down_DF).all(dim=0), is_new_F)
        assert torch.equal(found[0][~is_new_F], gate_FD[~is_new_F])
        chosen.append(tuple(is_new_F.tolist()))
    assert len(set(chosen)) == 4


def test_restarted_rows_have_mean_and_deviation_of_the_rows_they_replace():
    matrix_FD = torch.cat([torch.randn(2000, 20) * 3 + 5, torch.zeros(10, 20)])
    channels = torch.arange(2000)
    new = restarted(matrix_FD, channels, torch.Generator().manual_seed(0))
    assert abs(float(new[:2000].mean()) - float(matrix_FD[:2000].mean())) < 0.06
    assert abs(float(new[:2000].std()) / float(matrix_FD[:2000].std()) - 1) < 0.02
    assert not new[2000:].any()
    assert torch.equal(restarted(matrix_FD, channels[:0], torch.Generator()), matrix_FD)


def test_noise_is_relative_to_each_matrix_and_does_not_depend_on_the_order():
    matrices = {"gate": torch.randn(64, 64), "up": 100 * torch.randn(64, 64), "down": torch.randn(64, 64)}
    difference = Difference(noise=0.1, drop=0.0, router_std=0.02, seed=3)
    copies = Copies(lambda layer, kind: matrices[kind], 1, difference)
    for kind, matrix in matrices.items():
        change = copies.matrix(0, 1, kind) - matrix
        assert abs(float(change.std()) / (0.1 * float(matrix.std())) - 1) < 0.05
    again = Copies(lambda layer, kind: matrices[kind], 1, difference)
    assert torch.equal(again.matrix(0, 1, "down"), copies.matrix(0, 1, "down"))
    assert not torch.equal(again.matrix(0, 2, "down"), copies.matrix(0, 1, "down"))
    assert not torch.equal(again.matrix(1, 1, "down"), copies.matrix(0, 1, "down"))


def test_bfloat16_stays_and_copies_equal_the_dense_logits(dense, tmp_path):
    _, model = dense("llama")
    narrow = AutoModelForCausalLM.from_config(model.config).to(torch.bfloat16).eval()
    narrow.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "up", plan())
    up = loaded(tmp_path / "up")
    assert {p.dtype for p in up.parameters()} == {torch.bfloat16}
    expected = loss_and_logits(narrow)[1]
    difference = (loss_and_logits(up)[1] - expected).float().norm() / expected.float().norm()
    assert difference < 0.02, "two weighted halves are rounded to eight bits"


def test_offloaded_it_gives_the_resident_models_logits(dense, tmp_path):
    folder, _ = dense("qwen3")
    upcycle(folder, tmp_path / "up", plan(granularity=2))
    model = offload.load(tmp_path / "up", cache_experts=2)
    assert torch.equal(loss_and_logits(model)[1], loss_and_logits(loaded(tmp_path / "up"))[1])
    model.offload.close()


def test_the_command_writes_text_files_report_and_all_or_nothing(dense, tmp_path, run, capsys):
    folder, _ = dense("llama")
    out, report = tmp_path / "up", tmp_path / "report.json"
    arguments = ("upcycle", folder, "--experts", 4, "--top-k", 2, "--granularity", 2)
    assert run(*arguments, "--out", out, "--json", report) == 0
    assert "8 experts of width 24, 4 per token" in " ".join(capsys.readouterr().out.split())
    assert json.loads(report.read_text())["family"] == "mixtral"
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [97, 98, 99]
    assert loaded(out).generation_config.eos_token_id == 7
    assert run(*arguments, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-1000])
    before = sorted(tmp_path.iterdir())
    assert run("upcycle", damaged, "--experts", 4, "--top-k", 2, "--out", tmp_path / "new") == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("llama", {"granularity": 5}, "48 hidden channels do not divide by granularity 5"),
        ("llama", {"to": "qwen3_moe"}, "becomes mixtral or expertier"),
        ("scaled", {"to": "expertier"}, "rotary positions are scaled"),
        ("llama", {"to": "mixtrall"}, "mixtral"),
        (LlamaConfig(**SIZES, attention_bias=True), {}, "its attention has biases"),
        (LlamaConfig(**SIZES, mlp_bias=True), {}, "its feed-forwards have biases"),
        (Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1), {}, "a window only"),
    ],
)
def test_what_no_family_can_express_is_refused(dense, config, changes, message, tmp_path):
    if isinstance(config, str):
        folder, _ = dense(config)
    else:
        folder = tmp_path / "dense"
        config.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        upcycle(folder, tmp_path / "up", plan(**changes))
    assert not (tmp_path / "up").exists()


def test_plans_that_cannot_be_are_refused():
    for changes, message in (
        ({"top_k": 5}, "cannot visit 5 of 4"),
        ({"drop": 1.5}, "drop must lie in 0..1"),
        ({"noise": -1.0}, "must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            _ = plan(**changes).difference


def test_several_files_with_an_index(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(2, 2).half()}
    planned = [PlannedTensor(name, tuple(t.shape), t.dtype, lambda t=t: t.split(1)) for name, t in tensors.items()]
    seen = []
    assert write_tensors(tmp_path, planned, lambda *progress: seen.append(progress), shard_bytes=20) == 66
    assert seen == [(48, 66), (58, 66), (66, 66)]
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(weight_map.values())) == [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for name, expected in tensors.items():
        with safe_open(tmp_path / weight_map[name], "pt") as file:
            assert torch.equal(file.get_tensor(name), expected)


def test_pieces_that_are_not_what_was_planned_are_refused(tmp_path):
    for pieces, message in (
        ([torch.zeros(3)], "planned as 16 bytes"),
        ([torch.zeros(4).half()], "planned as torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tensors(tmp_path, [PlannedTensor("a", (4,), torch.float32, lambda pieces=pieces: pieces)])
