"""Sparsity of hidden units: zeros counted by hand, thresholds that keep perplexity, models that are not sparse."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, OPTConfig

from offload.quality.unit_sparsity import UnitSparsity, open_eager, unit_sparsity

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, activation_function="relu", dropout=0.0),
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=4),
    "experts": OlmoeConfig(**SIZES, intermediate_size=16, num_experts=4, num_experts_per_tok=2, hidden_act="relu"),
}
TEXT = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def test_zeros_are_those_of_the_activations(saved):
    model, units = open_eager(saved["opt"]), []
    hooks = [
        layer.fc2.register_forward_pre_hook(lambda _, inputs: units.append((inputs[0] == 0).float().mean()))
        for layer in model.model.decoder.layers
    ]
    with torch.no_grad():
        for sequence in TEXT:
            model(torch.tensor([sequence]), use_cache=False)
    for hook in hooks:
        hook.remove()
    found = unit_sparsity(model, TEXT)
    for layer in range(2):
        assert found.zeros_L[layer] == pytest.approx(float(torch.stack(units[layer::2]).mean()))
    assert 0.3 < found.zeros < 0.7


def test_units_are_left_out_as_far_as_perplexity_allows(saved):
    model = open_eager(saved["opt"])
    before = [found.sparsity for found in (unit_sparsity(model, TEXT, allowed=rise) for rise in (1e-6, 0.01, 0.5))]
    assert before == sorted(before)
    found = unit_sparsity(model, TEXT, allowed=0.05)
    assert found.sparse_perplexity <= 1.05 * found.perplexity * (1 + 1e-6)
    assert found.zeros <= found.sparsity + 1e-9
    assert found.sparsity > found.zeros + 0.01


def test_what_is_not_sparse_is_called_so(saved, run, capsys, tmp_path):
    found = unit_sparsity(open_eager(saved["llama"]), TEXT)
    assert found.zeros == 0
    assert not found.is_worthwhile
    assert found.verdict.startswith("not sparse: 0.0% of the units are exactly zero")
    with pytest.raises(ValueError, match="at least two tokens"):
        unit_sparsity(open_eager(saved["llama"]), [[3]])
    with pytest.raises(ValueError, match="has no feed-forward that is known here"):
        unit_sparsity(torch.nn.Linear(2, 2), TEXT)
    assert run("trace", "neurons", saved["llama"], "--data", "nowhere.txt", "--rise", "0") == 2
    assert "--rise is a share above 0" in capsys.readouterr().err


def test_units_of_experts_count_where_a_token_visits_them(saved):
    model = open_eager(saved["experts"])
    found = unit_sparsity(model, TEXT)
    assert found.unit_bytes_L == [3 * 32 * 4] * 2
    assert 0.3 < found.zeros < 0.7
    # a page has parts of eleven such units, and hardly ever are all of them zero
    assert found.read_share > 0.99
    assert unit_sparsity(open_eager(saved["opt"]), TEXT).unit_bytes_L == [2 * 32 * 4] * 2


def test_units_must_be_longer_than_what_the_pages_of_others_bring_along():
    def of(zeros, unit_bytes):
        shares = {"allowed": 0.01, "perplexity": 5.0, "sparse_perplexity": 5.0, "sparsity": zeros, "tokens": 9}
        return UnitSparsity(zeros_L=[zeros], unit_bytes_L=[unit_bytes], **shares)

    assert of(0.9, 4096).read_share == pytest.approx(1 - 0.9**2)
    assert of(0.9, 4096).verdict.startswith("sparse: 90.0% of the units are exactly zero")
    assert of(0.9, 512).read_share == pytest.approx(1 - 0.9**9)
    assert of(0.9, 512).verdict.startswith("sparse, but not enough for units of 512 bytes: 90.0%")
    assert of(0.3, 1 << 20).verdict.startswith("not sparse: 30.0%")
    assert [of(*each).is_worthwhile for each in ((0.9, 4096), (0.9, 512), (0.3, 1 << 20))] == [True, False, False]


def test_the_command_says_what_was_found(run, tmp_path, capsys):
    from tests.served_model import save_model

    folder = save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abc " * 100)
    command = ("trace", "neurons", folder, "--data", tmp_path / "text.txt", "--tokens", 64, "--json", tmp_path / "r")
    assert run(*command) == 0
    assert "not sparse" in capsys.readouterr().out
    assert json.loads((tmp_path / "r").read_text())["is_worthwhile"] is False
