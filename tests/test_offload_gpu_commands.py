"""The GPU tier from outside: commands with and without a device, budgets, predictions, the benchmark."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, OlmoeConfig

from experiments.bench.offloading import gpu as bench_offload_gpu
from experiments.evidence.replay import ReplaySize, build_replay
from offload.gpu import devices as gpu_devices
from offload.gpu import rows as gpu_rows
from offload.gpu.plan.budget import CONTEXT_BYTES, gpu_table, plan_gpu, ring_slots, split_needs
from offload.gpu.plan.cost import predict_gpu_decode
from offload.memory.budget import Needs
from offload.memory.cost import DecodeWork
from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace
from tests.simulated_lane import SimulatedLane

HARDWARE = Hardware(
    disk_bytes_per_s=2e9,
    cached_bytes_per_s=8e9,
    memory_bytes_per_s=30e9,
    exact_bytes_per_s=20e9,
    fast_bytes_per_s=30e9,
    layer_s=0.0,
    pcie_bytes_per_s=25e9,
    gpu_bytes_per_s=1e12,
)
NEEDS = Needs(process_bytes=5, weight_bytes=6 << 20, kv_bytes=7 << 20, activation_bytes=8 << 20, staging_bytes=9)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OlmoeConfig(**sizes, num_key_value_heads=2, intermediate_size=24, num_experts=8, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setattr(gpu_devices, "LANES", {"cuda": SimulatedLane})
    monkeypatch.setattr("offload.gpu.tier.experts_for", lambda module, count, *_: gpu_rows.LoopExperts(module, count))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_without_a_gpu_one_line_and_exit_code_2(model_folder, run, capsys, command):
    commands = {
        "generate": ("generate", model_folder, "--prompt", "a", "--gpu-memory", "8GiB", "--device", "cuda"),
        "bench": ("bench", "offload", model_folder, "--device", "cuda"),
    }
    assert run(*commands[command]) == 2
    error = capsys.readouterr().err
    assert "finds no CUDA device" in error
    assert len(error.strip().splitlines()) == 1


def test_generate_on_a_device(simulated, model_folder, run, tmp_path):
    arguments = ("--prompt", "abc", "--max-new-tokens", 7, "--device", "cuda", "--gpu-memory", "900MiB")
    assert run("generate", model_folder, *arguments, "--cpu-memory", "12GiB", "--json", tmp_path / "g.json") == 0
    report = json.loads((tmp_path / "g.json").read_text())
    resident = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = resident.generate(torch.tensor([list(b"abc")]), max_new_tokens=7, do_sample=False)[0, 3:]
    assert report["token_ids"] == expected.tolist()
    assert report["report"]["gpu"]["copied_bytes"] > 0


def test_fit_knows_the_tier_without_a_device(model_folder, run, tmp_path, capsys):
    HARDWARE.save(tmp_path / "hardware.toml")
    common = ("--cpu-memory", "16GiB", "--hardware", tmp_path / "hardware.toml")
    assert run("fit", model_folder, "--gpu-memory", "1GiB", *common, "--json", tmp_path / "f.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "CUDA context" in shown
    assert "tok/s" in shown
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["gpu_slots_per_layer"] == [8, 8]
    assert found["predicted"]["wire_s"] == 0
    assert run("fit", model_folder, "--gpu-memory", "300MiB", *common) == 1
    assert "gpu_memory: 300.00 MiB is too small" in " ".join(capsys.readouterr().out.split())


def test_hardware_files_from_before_there_was_a_gpu(tmp_path):
    HARDWARE.save(tmp_path / "new.toml")
    assert Hardware.load(tmp_path / "new.toml") == HARDWARE
    lines = (tmp_path / "new.toml").read_text().splitlines()
    (tmp_path / "old.toml").write_text("\n".join(line for line in lines if "pcie" not in line and "gpu" not in line))
    old = Hardware.load(tmp_path / "old.toml")
    assert old == replace(HARDWARE, pcie_bytes_per_s=0.0, gpu_bytes_per_s=0.0)
    with pytest.raises(ValueError, match="run `expertier calibrate`"):
        predict_gpu_decode(work(), 0.5, old)
    (tmp_path / "odd.toml").write_text((tmp_path / "old.toml").read_text() + "\nspeed = 3")
    with pytest.raises(ValueError, match="speed"):
        Hardware.load(tmp_path / "odd.toml")


def work(**changes):
    sizes = {"num_layers": 10, "experts_per_layer": 4, "expert_bytes": 10_000_000, "resident_bytes": 1_000_000_000}
    return DecodeWork(**sizes, **({"hit_rate": 1.0} | changes))


def test_predictions_by_hand():
    found = predict_gpu_decode(work(), 0.5, HARDWARE)
    assert found.wire_s == pytest.approx(200e6 / 25e9)
    assert found.token_s == pytest.approx(0.001 + 0.008 + 0.0002)
    assert (found.binds, found.floor_s) == ("PCIe", found.wire_s)
    assert predict_gpu_decode(work(hit_rate=0.5), 0.5, HARDWARE).binds == "disk"
    assert predict_gpu_decode(work(), 1.0, HARDWARE).binds == "GPU memory"


@given(
    slots=st.lists(st.tuples(st.integers(1, 50 << 20), st.integers(1, 16)), min_size=1, max_size=5),
    top_k=st.integers(1, 4),
    limit=st.integers(1 << 30, 4 << 30),
)
def test_a_budget_is_never_exceeded_and_the_one_that_is_named_is_enough(slots, top_k, limit):
    sizes, experts = zip(*slots, strict=True)
    _, needs = split_needs(NEEDS, 3 << 20)
    try:
        plan = plan_gpu(limit, needs, sizes, experts, top_k)
    except ValueError as error:
        enough = float(str(error).split("give at least ")[1].split()[0])
        plan = plan_gpu(int((enough + 0.01) * (1 << 30)), needs, sizes, experts, top_k)
    assert plan.fixed_bytes + plan.slot_bytes <= plan.limit_bytes
    assert all(count >= min(top_k, most) for count, most in zip(plan.num_slots, experts, strict=True))
    assert sum(size for _, size in gpu_table(plan)) == plan.fixed_bytes + plan.slot_bytes


def test_what_goes_where():
    on_cpu, on_gpu = split_needs(NEEDS, 3)
    assert on_cpu == Needs(process_bytes=5, weight_bytes=0, kv_bytes=0, activation_bytes=0, staging_bytes=9)
    assert (on_gpu.process_bytes, on_gpu.weight_bytes, on_gpu.staging_bytes) == (CONTEXT_BYTES, 6 << 20, 3)
    assert [ring_slots(count) for count in (1, 3, 200)] == [2, 3, 8]


@pytest.mark.slow
def test_the_benchmark_on_a_simulated_device(simulated, monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(20)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(20, np.int32), metadata={"num_experts": 8})
    build_replay(trace, tmp_path, ReplaySize(hidden=128, expert=64))
    contestants = list(bench_offload_gpu.CONTESTANTS)
    limits = ["800MiB", "100MiB"]
    bench_offload_gpu.bench_gpu(tmp_path, limits, contestants, 6, 5, tmp_path / "b.json", record=False)
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["contestant"] for row in rows] == contestants * 2
    assert all(row["tok_per_s"] > 0 and row["note"] == "" for row in rows[: len(contestants)])
    assert all("too small" in row["note"] for row in rows[len(contestants) :])
    with pytest.raises(ValueError, match="unknown contestant 'theirs'"):
        bench_offload_gpu.bench_gpu(tmp_path, ["1GiB"], ["theirs"], 6, 5, None, record=False)


def test_a_gpu_budget_that_is_no_size(model_folder, run):
    assert run("fit", model_folder, "--gpu-memory", "12parsecs") == 2
