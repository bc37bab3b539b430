import inspect
import json
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig

import moe.cli
import offload
from moe import save_byte_tokenizer
from moe.conversion.dense_to_experts.command import refactor as refactor_command
from moe.conversion.dense_to_experts.domain_masks import cluster, hidden_channels, mean_activations, slice_layer
from moe.conversion.dense_to_experts.refactor import RefactorPlan, RouterSize, refactor
from moe.conversion.dense_to_experts.slicing import sliced_model, storage
from moe.conversion.dense_to_experts.training import Rounds, distillation_loss, overlap_target_LTE
from moe.conversion.families import config_of_dense

ROUTER = {"router_width": 16, "router_heads": 2}


def dense_model(**overrides):
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).eval()


@pytest.fixture
def texts(tmp_path):
    files = []
    for name, phrase in (("prose", "the cat sat on the mat and looked. "), ("code", "x[i] = (y+1)*{z: 2}; ")):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text(phrase * 60)
    return files


def plan(texts, rounds=1, **changes):
    steps = Rounds(rounds=rounds, router_steps=12, expert_steps=6, batch_size=4, router_rate=5e-3, expert_rate=1e-3)
    return RefactorPlan(
        **({"texts": tuple(texts), "sequence_length": 24, "tokens": 2400, "rounds": steps} | changes),
        router_options=ROUTER,
    )


def test_masks_by_hand():
    activation_EF = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1], [9.0, 8, 1, 1, 7, 6, 1, 1]])
    cut = slice_layer(activation_EF, keep=0.5, align=1)
    assert cut.permanent.tolist() == [0, 1]
    assert [expert.tolist() for expert in cut.experts] == [[2, 3], [4, 5]]
    aligned = slice_layer(activation_EF, keep=0.5, align=4)
    assert aligned.permanent.tolist() == []
    assert [expert.tolist() for expert in aligned.experts] == [[0, 1, 2, 3], [0, 1, 4, 5]]


def test_domains_that_agree_still_leave_every_expert_a_channel():
    cut = slice_layer(torch.arange(8.0).expand(2, 8), keep=0.5, align=2)
    assert cut.permanent.tolist() == [6, 7], "the strongest of the common channels 4..7"
    assert [expert.tolist() for expert in cut.experts] == [[4, 5], [4, 5]]


@pytest.mark.parametrize("align", [1, 8])
def test_sliced_model_is_the_dense_one_with_the_chosen_domains_mask(align):
    dense = dense_model().double()
    token_BS = torch.randint(256, (3, 11))
    activation_BLF = mean_activations(dense, token_BS)
    slices = [slice_layer(activation_BLF[:, layer], 0.5, align) for layer in range(2)]
    model = sliced_model(dense, slices, ROUTER)
    output = model(token_BS)
    expert_BS = output.router_stats[0].kept.expert_TK.view(3, 11)

    def mask(layer):
        def hook(_module, inputs):
            return (inputs[0] * slices[layer].is_kept_EF[expert_BS],)

        return hook

    for layer, block in enumerate(dense.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(mask(layer))
    # rotary angles are float32 in both, rounded differently
    torch.testing.assert_close(output.logits, dense(token_BS).logits, atol=1e-5, rtol=1e-4)


def test_trap_experts_hold_slices_of_their_own_not_masked_dense_weights():
    dense = dense_model()
    slices = [slice_layer(torch.rand(3, 64), 0.5, 8) for _ in range(2)]
    model = sliced_model(dense, slices, ROUTER)
    for layer, cut in zip(model.model.moe_layers, slices, strict=True):
        width = len(cut.experts[0])
        assert layer.experts.gate_up_proj.shape == (3, 2 * width, 32)
        assert width + len(cut.permanent) == 32
        assert width % 8 == 0
    with torch.no_grad():
        model.model.moe_layers[0].experts.gate_up_proj[0] += 1
    for expert in (1, 2):
        expected = dense.model.layers[0].mlp.gate_proj.weight[slices[0].experts[expert]]
        assert torch.equal(model.model.moe_layers[0].experts.gate_up_proj[expert].chunk(2)[0], expected)


def test_trap_routers_embedding_starts_as_the_first_columns_of_the_models():
    dense = dense_model()
    model = sliced_model(dense, [slice_layer(torch.rand(3, 64), 0.5, 8) for _ in range(2)], ROUTER)
    table = model.model.moe_layers[0].router.core.embed_tokens.weight
    assert torch.equal(table, dense.get_input_embeddings().weight[:, :16])


def test_keeping_everything_is_the_dense_model():
    dense = dense_model()
    token_BS = torch.randint(256, (3, 11))
    activation_BLF = mean_activations(dense, token_BS)
    slices = [slice_layer(activation_BLF[:, layer], 1.0, 8) for layer in range(2)]
    torch.testing.assert_close(
        sliced_model(dense, slices, ROUTER)(token_BS).logits, dense(token_BS).logits, atol=1e-5, rtol=1e-4
    )
    cost = storage(64, slices)
    assert cost["permanent_widths"] == [56, 56]
    assert cost["active_of_dense"] == 1.0
    assert cost["stored_of_dense"] == (56 + 3 * 8) / 64


def test_storage_counts_every_copy():
    activation_EF = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1], [9.0, 8, 1, 1, 7, 6, 1, 1]])
    cost = storage(8, [slice_layer(activation_EF, 0.5, 1), slice_layer(activation_EF, 0.5, 4)])
    assert cost == {
        "expert_widths": [2, 4],
        "permanent_widths": [2, 0],
        "stored_of_dense": (6 + 8) / 16,
        "active_of_dense": 0.5,
        "distinct_of_dense": 12 / 16,
    }


def test_mean_activations_are_those_that_enter_the_down_projection():
    dense, token_BS = dense_model(), torch.randint(256, (2, 5))
    mlp, seen = dense.model.layers[1].mlp, []
    mlp.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    activation_BLF = mean_activations(dense, token_BS)
    for row, x in zip(activation_BLF[:, 1], seen, strict=True):
        h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        torch.testing.assert_close(row, h[0].abs().mean(dim=0))


def test_clusters_find_what_differs():
    centres = torch.randn(3, 1, 40)
    truth = torch.tensor([0, 1, 2] * 8)
    found = cluster(centres[truth] + 0.1 * torch.randn(24, 1, 40), 3)
    assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist(), strict=True)}) == 3
    with pytest.raises(ValueError, match="at least as many sequences"):
        cluster(torch.randn(2, 1, 4), 3)


def test_targets_and_loss_equal_a_plain_loop():
    dense, token_BS = dense_model(), torch.randint(256, (2, 5))
    slices = [slice_layer(torch.rand(3, 64), 0.5, 8) for _ in range(2)]
    with hidden_channels(dense) as hidden:
        dense(token_BS)
    target_LTE = overlap_target_LTE(hidden, slices, 7.0)
    logit_TE = torch.randn(10, 3)
    total = 0.0
    for layer in range(2):
        for token, h_F in enumerate(hidden[layer].flatten(0, 1)):
            own = set(h_F.abs().argsort(descending=True)[:32].tolist())
            kept = [set(row.nonzero()[:, 0].tolist()) for row in slices[layer].is_kept_EF]
            target_E = torch.tensor([7.0 * len(own & mask) / 32 for mask in kept]).softmax(dim=0)
            torch.testing.assert_close(target_LTE[layer, token], target_E)
            q_E = logit_TE[token].softmax(dim=0)
            total += sum(float(q * (q.log() - t.log())) for q, t in zip(q_E, target_E, strict=True)) / 20
    assert float(distillation_loss(logit_TE, target_LTE)) == pytest.approx(total, rel=1e-4)


def test_trap_targets_use_absolute_activations():
    """The released loss takes signed ones, its masks absolute ones."""
    cut = slice_layer(torch.rand(2, 64), 0.5, 8)
    hidden = torch.randn(1, 4, 64)
    assert torch.equal(overlap_target_LTE([hidden], [cut], 1.0), overlap_target_LTE([-hidden], [cut], 1.0))


def test_command_writes_a_model_that_generates_under_offload(tmp_path, texts):
    dense_model().save_pretrained(tmp_path / "dense")
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["refactor", str(tmp_path / "dense"), "--out", str(out), "--json", str(report)]
    arguments += [part for text in texts for part in ("--data", str(text))]
    arguments += ["--rounds", "1", "--router-steps", "8", "--expert-steps", "4", "--batch-size", "2"]
    arguments += ["--sequence-length", "24", "--tokens", "1200", "--router-width", "16", "--router-heads", "2"]
    moe.cli.app(arguments, standalone_mode=False)
    made = json.loads(report.read_text())
    assert made["domains"] == 2
    assert made["loss_after"] < made["loss_sliced"]
    resident = AutoModelForCausalLM.from_pretrained(out, experts_implementation="grouped_mm")
    loaded = offload.load(out, cache_experts=1)
    token_BS = torch.randint(256, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded(token_BS).logits, resident(token_BS).logits)
    assert loaded.generate(token_BS, max_new_tokens=3, do_sample=False).shape == (1, 12)
    with pytest.raises(ValueError, match="exists already"):
        moe.cli.app(arguments, standalone_mode=False)


def test_rounds_train_router_and_experts_apart(tmp_path, texts):
    dense_model(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    report = refactor(tmp_path / "dense", tmp_path / "out", plan(texts, rounds=2, domains=3))
    assert report["domains"] == 3
    first, second = report["rounds"]
    assert second["distillation_loss"] < first["distillation_loss"]
    assert first["loss_after_experts"] < first["loss_after_router"]
    again = refactor(tmp_path / "dense", tmp_path / "again", plan(texts, rounds=2, domains=3))
    assert again == report, "the same seed gives the same model"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(attention_bias=True), "attention_bias"),
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
        (LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}), "scaled"),
        (MistralConfig(sliding_window=128), "window of 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        config_of_dense(config)


def test_bad_plans_are_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="one text is one domain"):
        plan(texts[:1])
    with pytest.raises(ValueError, match="keep must lie in"):
        plan(texts, keep=0.0)
    dense_model().save_pretrained(tmp_path / "dense")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match="give two sequences of 24"):
        refactor(tmp_path / "dense", tmp_path / "out", plan([*texts, short]))
    assert not (tmp_path / "out").exists()


def test_every_flag_is_a_field_with_its_default(capsys):
    flagged = {
        found.name: found.default
        for group in (RefactorPlan, Rounds, RouterSize)
        for found in fields(group)
        if "help" in found.metadata
    }
    parameters = inspect.signature(refactor_command).parameters
    assert set(parameters) == set(flagged) | {"model", "out", "json_file"}
    assert all(parameters[name].default == value for name, value in flagged.items() if value is not MISSING)
    with pytest.raises(SystemExit):
        moe.cli.app(["refactor", "--help"])
    printed = capsys.readouterr().out
    names = ("--data", "--router-width", "--router-steps", "--keep", "--sequence-length", "--json", "--domains")
    assert all(name in printed for name in names)
    assert "--shrink" not in printed


def test_a_flag_out_of_range_is_refused_before_the_model_is_read(tmp_path, texts):
    common = ["refactor", str(tmp_path / "none"), "--data", str(texts[0]), "--out", str(tmp_path / "out")]
    for options, message in (
        (["--keep", "0"], "keep must lie in"),
        (["--router-rate", "-1", "--domains", "2"], "router_rate must be a positive number"),
        (["--domains", "1"], "domains must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            moe.cli.app([*common, *options], standalone_mode=False)


def test_the_tokenizer_goes_along(tmp_path, texts):
    dense_model().save_pretrained(tmp_path / "dense")
    save_byte_tokenizer(tmp_path / "dense")
    refactor(tmp_path / "dense", tmp_path / "out", plan(texts))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"] == [97, 98, 99]
