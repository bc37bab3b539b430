"""Feed-forwards by units: bounds that leave out no active unit, slots that read the difference, the model's logits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import offload
from offload.neurons.bounds import GateBounds
from offload.neurons.unit_layer import is_zero_below_zero

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "opt": OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=64, activation_function="relu", dropout=0.0),
    "llama": LlamaConfig(**SIZES, intermediate_size=192, num_key_value_heads=2, hidden_act="relu2", mlp_bias=True),
    "silu": LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2),
}
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models most of whose units are zero."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("fc1.bias", "gate_proj.bias")):
                    parameter.normal_(-0.2, 0.1)
                elif parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture
def bundled(saved, run, tmp_path):
    def pack(name):
        assert run("pack", saved[name], "--out", tmp_path / name, "--bundle") == 0
        return saved[name], tmp_path / name

    return pack


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_no_active_unit_is_left_out_and_few_others_are_chosen():
    generator = torch.Generator().manual_seed(0)
    for D, dtype in ((64, torch.float32), (256, torch.bfloat16)):
        gate_FD = torch.randn(500, D, generator=generator).to(dtype)
        gate_FD[:5] *= 1e-6
        bounds = GateBounds.of(gate_FD)
        bias_F = torch.randn(500, generator=generator).to(dtype)
        for scale in (1e-3, 1.0, 1e4):
            x_TD = (torch.randn(1, D, generator=generator) * scale).to(dtype)
            exact_TF = x_TD.double() @ gate_FD.double().T + bias_F.double()
            for product_TF in (exact_TF, torch.nn.functional.linear(x_TD, gate_FD, bias_F)):
                is_active_F = (product_TF > 0).any(dim=0)
                is_chosen_F = bounds.may_be_active(x_TD, bias_F)
                assert not (is_active_F & ~is_chosen_F).any()
                assert is_chosen_F.sum() < 1.25 * is_active_F.sum() + 5


@pytest.mark.parametrize(("name", "cache_units"), [("opt", 0), ("opt", 60), ("llama", 30), ("llama", 999)])
def test_logits_and_tokens_are_the_models(bundled, name, cache_units):
    folder, pack = bundled(name)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = offload.load(folder, pack=pack, cache_units=cache_units, arithmetic="exact")
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(resident), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0),
        resident.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0),
    )
    found = model.offload.report()["units"]
    units = sum(found["units_per_layer"])
    assert found["active"] <= found["chosen"] < 0.8 * found["calls"] / 3 * units
    if cache_units == 0:
        assert found["read"] == found["chosen"]
    if cache_units == 999:
        assert found["read"] <= units  # each once at most
    assert model.offload.report()["bytes_read"] == found["bytes_read"]
    model.offload.close()
    with pytest.raises(RuntimeError, match="this model was closed"):
        logits(model)


def test_only_the_difference_is_read(bundled):
    """What is there is not read again, and units that were used longest ago leave first."""
    folder, pack = bundled("opt")
    model = offload.load(folder, pack=pack, cache_units=40)
    slots, rng = model.offload.runtime.units.layers[1], np.random.default_rng(0)
    whole = AutoModelForCausalLM.from_pretrained(folder).model.decoder.layers[1]
    rows_FW = torch.cat([whole.fc1.weight, whole.fc2.weight.T], dim=1).detach()
    held, used, read = set(), {}, slots.counters.read
    for time in range(60):
        unit_n = np.sort(rng.choice(256, int(rng.integers(1, 70)), replace=False))
        (found_PW,) = slots.gather([unit_n])
        assert torch.equal(found_PW[: len(unit_n)], rows_FW[unit_n])
        assert len(found_PW) in (64, 128)  # a round number, whose products oneDNN keeps few of
        assert not found_PW[len(unit_n) :].any()
        units = set(unit_n.tolist())
        read += len(units - held)
        assert slots.counters.read == read
        used.update(dict.fromkeys(units, time))
        now = {int(unit) for unit in slots._unit_C if unit >= 0}
        assert held & units <= now
        assert len(now) == min(40, len(held | units))
        assert all(used[gone] <= used[kept] for gone in held - now for kept in now)
        assert [slots._unit_C[slots._slot_F[unit]] for unit in now] == list(now)
        held = now
    model.offload.close()


def test_a_budget_decides_how_many_units_stay(bundled):
    folder, pack = bundled("opt")
    model = offload.load(folder, pack=pack)
    assert model.offload.report()["units"]["slots_per_layer"] == [256] * 3
    memory = model.offload.report()["memory"]
    assert memory["window_bytes"] > 3 * 256 * 2 * 64 * 4
    model.offload.close()
    with pytest.raises(ValueError, match="give at least"):
        offload.load(folder, pack=pack, cpu_memory="100MiB")


def test_a_call_within_a_call_and_a_damaged_read_are_errors(bundled, monkeypatch):
    folder, pack = bundled("llama")
    model = offload.load(folder, pack=pack, cache_units=10)
    expected = logits(model)

    def call_again(*_):
        handle.remove()
        logits(model)

    handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(call_again)
    with pytest.raises(RuntimeError, match="within another of its calls"):
        logits(model)
    assert torch.equal(logits(model), expected)
    size = pack.stat().st_size
    with pack.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match=r"ends within the units of model\.layers"):
        logits(model, torch.randint(96, (1, 40)))
    model.offload.close()
    with pytest.raises(ValueError, match=rf"2000 bytes; {size} were expected"):
        offload.load(folder, pack=pack)


def test_what_is_not_sparse_or_of_another_model_is_refused(saved, bundled, run, tmp_path, capsys):
    assert run("pack", saved["silu"], "--out", tmp_path / "x", "--bundle") == 2
    message = capsys.readouterr().err
    assert "its activation (SiLUActivation) is not zero where the gate is negative" in message.replace("\n", " ")
    assert not (tmp_path / "x").exists()
    _, pack = bundled("opt")
    with pytest.raises(ValueError, match="of another model"):
        offload.load(saved["llama"], pack=pack)
    with pytest.raises(ValueError, match="cache_units is about the units of a bundle"):
        offload.load(saved["opt"], cache_units=3)
    with pytest.raises(ValueError, match="leave resident_layers or pack out"):
        offload.load(saved["opt"], pack=pack, resident_layers=0)
    assert run("pack", saved["opt"], "--out", tmp_path / "x", "--bundle", "--compress") == 2
    (tmp_path / "other").write_text("mine")
    assert run("pack", saved["opt"], "--out", tmp_path / "other", "--bundle") == 2
    assert not is_zero_below_zero(torch.nn.LeakyReLU())
    assert not is_zero_below_zero(torch.nn.Sigmoid())


KILLED = """
import os, signal, sys
from pathlib import Path
import transformers
from offload.neurons.packing import pack_units

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
folder, out = map(Path, sys.argv[1:])
for moment in (1, 2, 3):
    if not os.fork():
        pack_units(folder, out, lambda done, total: done * 3 < moment * total or os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    print(*sorted(path.name for path in out.parent.iterdir()))
"""


@pytest.mark.slow
def test_a_killed_pack_leaves_nothing_that_loads_and_the_next_one_succeeds(saved, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(saved["opt"]), str(tmp_path / "units")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    left = [line.split() for line in done.stdout.splitlines()]
    assert [len(names) for names in left] == [1, 1, 1], "each run removes what the killed one before it left"
    (part,) = tmp_path.iterdir()
    assert part.name in left[2]
    whole = tmp_path / "units"
    offload.pack_units(saved["opt"], whole)
    assert list(tmp_path.iterdir()) == [whole]


def test_ctrl_c_while_a_bundle_is_written_leaves_what_was_there(saved, run, tmp_path, monkeypatch):
    made, of = [], GateBounds.of

    def interrupt(gate_FD):
        made.append(gate_FD)
        if len(made) == 2:
            signal.raise_signal(signal.SIGINT)
        return of(gate_FD)

    monkeypatch.setattr(GateBounds, "of", interrupt)
    assert run("pack", saved["opt"], "--out", tmp_path / "units", "--bundle") == 130
    assert not list(tmp_path.iterdir())
    assert run("pack", saved["opt"], "--out", tmp_path / "units", "--bundle") == 0
    before = (tmp_path / "units").read_bytes()
    made.clear()
    assert run("pack", saved["opt"], "--out", tmp_path / "units", "--bundle") == 130
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
