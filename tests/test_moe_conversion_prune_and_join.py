"""Pruning and joining experts: the same function where it must be, loadable checkpoints of several families."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import offload
from experiments.evidence.resident import load_resident
from moe import MoEForCausalLM, drawn, join, most_used, prune, save_byte_tokenizer
from moe.cli import app
from routing import RoutingTrace

E, K, L = 6, 2, 3
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "initializer_range": 0.2,
}
FAMILIES = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=E)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=E)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=E, moe_intermediate_size=24, head_dim=8)
    ),
}


@pytest.fixture(params=[*FAMILIES, "ours", "ours with a bias and nulls"])
def model(request, tiny_config):
    if request.param in FAMILIES:
        return FAMILIES[request.param]().eval()
    options = {}
    if request.param != "ours":
        options = {"router": "longcat", "zero_compute_experts": ["copy", "zero"], "num_shared_experts": 1}
    model = MoEForCausalLM(tiny_config(**options)).eval()
    for router in model.model.routers:
        if router.bias_R is not None:
            router.bias_R.normal_()
    return model


def logits(model, token_BS):
    with torch.no_grad():
        return model(token_BS).logits


def kept(*rows):
    return np.array(rows)


def test_pruning_nothing_and_reordering_change_nothing(model):
    token_BS = torch.randint(0, 96, (2, 9))
    order = np.stack([np.random.default_rng(layer).permutation(E) for layer in range(L)])
    torch.testing.assert_close(logits(prune(model, order), token_BS), logits(model, token_BS))


def test_a_pruned_model_has_the_rows_of_what_is_kept(model, tmp_path):
    """Tensor by tensor, and the checkpoint loads, resident and offloaded."""
    keep = kept([0, 2, 5], [1, 2, 3], [0, 4, 5])
    pruned = prune(model, keep)
    state, theirs = model.state_dict(), pruned.state_dict()
    for name, value in theirs.items():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if value.shape == state[name].shape:
            assert torch.equal(value, state[name]), name
        else:
            rows = [*keep[layer], *range(E, len(state[name]))]
            assert torch.equal(value, state[name][rows]), name
    token_BS = torch.randint(0, 96, (2, 9))
    pruned.save_pretrained(tmp_path)
    loaded = load_resident(tmp_path)
    assert torch.equal(logits(loaded, token_BS), logits(pruned, token_BS))
    offloaded = offload.load(tmp_path, cache_experts=2)
    torch.testing.assert_close(logits(offloaded, token_BS), logits(pruned, token_BS))


def test_most_used_experts_are_kept_ties_to_the_lower_id():
    expert_TLK = np.array([[[0, 3]], [[3, 5]], [[5, 1]], [[-1, 3]]], dtype=np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(4, np.int32), metadata={"num_experts": 6})
    assert most_used(trace, 2).tolist() == [[3, 5]]
    assert most_used(trace, 3).tolist() == [[0, 3, 5]]
    assert most_used(trace, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_random_experts_are_different_and_repeat_with_the_seed():
    chosen = drawn(4, 10, 3, seed=1)
    assert all(len(set(row)) == 3 and row == sorted(row) for row in chosen.tolist())
    assert np.array_equal(chosen, drawn(4, 10, 3, seed=1))
    assert not np.array_equal(chosen, drawn(4, 10, 3, seed=2))


def copy_with_other_experts(model):
    other = type(model)(model.config).eval()
    state = {
        name: value if ".experts." in name or ".gate." in name or ".router." in name else model.state_dict()[name]
        for name, value in other.state_dict().items()
    }
    other.load_state_dict(state)
    return other


def test_joined_experts_stand_beside_each_other(model, tmp_path):
    other = copy_with_other_experts(model)
    joined = join(model, other)
    ours, theirs, both = model.state_dict(), other.state_dict(), joined.state_dict()
    grown = [name for name in both if both[name].shape != ours[name].shape]
    assert grown
    for name in both:
        if name in grown:
            assert torch.equal(both[name], torch.cat([ours[name][:E], theirs[name][:E], ours[name][E:]]))
        else:
            assert torch.equal(both[name], ours[name])
    joined.save_pretrained(tmp_path)
    loaded = load_resident(tmp_path)
    token_BS = torch.randint(0, 96, (2, 9))
    assert torch.equal(logits(loaded, token_BS), logits(joined, token_BS))
    first, second = (np.arange(E)[None].repeat(L, 0) + start for start in (0, E))
    torch.testing.assert_close(logits(prune(joined, first), token_BS), logits(model, token_BS))
    if "router.bias_R" not in str(list(both)):  # rows of nulls come from the first model
        torch.testing.assert_close(logits(prune(joined, second), token_BS), logits(other, token_BS))


def test_backbones_that_differ_need_a_word(tiny_config):
    first, second = (MoEForCausalLM(tiny_config()).eval() for _ in range(2))
    with pytest.raises(ValueError, match="say which backbone"):
        join(first, second)
    name = "model.layers.0.self_attn.q_proj.weight"
    values = [model.state_dict()[name] for model in (first, second)]
    assert torch.equal(join(first, second, "first").state_dict()[name], values[0])
    assert torch.equal(join(first, second, "second").state_dict()[name], values[1])
    torch.testing.assert_close(join(first, second, "mean").state_dict()[name], sum(values) / 2)


def test_misfits_say_what_was_expected(tiny_config):
    model = MoEForCausalLM(tiny_config())
    for keep, message in (
        (kept([0, 1, 2]), "3 MoE layers"),
        (np.zeros((3, 7), int), "lie in 1..6"),
        (kept(*[[0, 0, 1]] * 3), "different ids"),
        (kept(*[[0, 6]] * 3), "0..5"),
        (kept(*[[1]] * 3), "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, keep)
    keep = kept(*[[0, 1, 2]] * 3)
    grouped = tiny_config(router="deepseek_v3", router_options={"num_groups": 3, "groups_kept": 2})
    with pytest.raises(ValueError, match="groups"):
        prune(MoEForCausalLM(grouped), keep)
    with pytest.raises(ValueError, match="one row per expert"):
        prune(MoEForCausalLM(tiny_config(router="moepp", zero_compute_experts=["zero"])), keep)
    with pytest.raises(ValueError, match="hidden_size"):
        join(model, MoEForCausalLM(tiny_config(hidden_size=16)))
    with pytest.raises(ValueError, match="one class"):
        join(model, FAMILIES["olmoe"]())
    with pytest.raises(ValueError, match="backbone must be one of"):
        join(model, model, "both")


def test_commands_write_checkpoints(tiny_config, tmp_path):
    model = MoEForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "a")
    trace = RoutingTrace(
        expert_TLK=np.tile(np.array([[1, 4]], np.int16), (5, L, 1)),
        sequence_T=np.zeros(5, np.int32),
        metadata={"num_experts": E},
    )
    trace.save(tmp_path / "trace.npz")
    folder, report = str(tmp_path / "a"), tmp_path / "report.json"
    options = [
        "--keep",
        "2",
        "--trace",
        str(tmp_path / "trace.npz"),
        "--out",
        str(tmp_path / "b"),
        "--json",
        str(report),
    ]
    app(["prune", folder, *options], standalone_mode=False)
    assert json.loads(report.read_text())["kept"] == [[1, 4]] * L
    app(["prune", folder, "--keep", "3", "--seed", "5", "--out", str(tmp_path / "c")], standalone_mode=False)
    app(["join", str(tmp_path / "b"), str(tmp_path / "c"), "--out", str(tmp_path / "d")], standalone_mode=False)
    joined = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert joined.config.num_experts == 5
    with pytest.raises(ValueError, match="exists already"):
        app(["prune", folder, "--keep", "3", "--out", str(tmp_path / "c")], standalone_mode=False)
    with pytest.raises(ValueError, match=r"no config\.json"):
        app(["prune", str(tmp_path), "--keep", "3", "--out", str(tmp_path / "e")], standalone_mode=False)


def test_commands_take_the_tokenizer_along_and_refuse_two_different_ones(tiny_config, tmp_path):
    for name in ("a", "b"):
        MoEForCausalLM(tiny_config(vocab_size=256, eos_token_id=0)).save_pretrained(tmp_path / name)
        save_byte_tokenizer(tmp_path / name)
    app(["prune", str(tmp_path / "a"), "--keep", "3", "--out", str(tmp_path / "c")], standalone_mode=False)
    both = [str(tmp_path / name) for name in ("a", "b")]
    app(["join", *both, "--backbone", "mean", "--out", str(tmp_path / "d")], standalone_mode=False)
    for name in ("c", "d"):
        assert AutoTokenizer.from_pretrained(tmp_path / name)("abc")["input_ids"] == [97, 98, 99]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).generation_config.eos_token_id == 0
    changed = tmp_path / "b/tokenizer.json"
    changed.write_text(changed.read_text().replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97'))
    with pytest.raises(ValueError, match="different tokenizers"):
        app(["join", *both, "--backbone", "mean", "--out", str(tmp_path / "e")], standalone_mode=False)
    with pytest.raises(ValueError, match="did you mean 'first'"):
        app(["join", *both, "--backbone", "frist", "--out", str(tmp_path / "e")], standalone_mode=False)
    with pytest.raises(ValueError, match="does not exist"):
        app(
            ["prune", both[0], "--keep", "3", "--out", str(tmp_path / "e"), "--json", str(tmp_path / "no/x.json")],
            standalone_mode=False,
        )


def test_pruned_and_joined_checkpoints_train_on(model, tmp_path):
    """What is meant to follow: a few steps on one batch lower its loss, and every expert that is visited learns."""
    token_BS = torch.randint(0, 96, (4, 16))
    prune(join(model, copy_with_other_experts(model)), kept(*[[0, 3, 7, 9]] * L)).save_pretrained(tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = trained(token_BS, labels=token_BS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
