"""Tiers of one machine: optimal for equal sizes, one reader of hardware.toml, no GPU where there is none."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from placement import Cluster, Plan, Problem
from placement.cli import app
from placement.solving.tiers import Machine, choose_tiers, load_machine, place_tiers, tier_counts, tier_seconds
from routing.ground.hardware import Hardware

MACHINE = Machine(
    gpu_bytes=2.0,
    cpu_bytes=2.0,
    hbm_bytes_per_s=100.0,
    dram_bytes_per_s=10.0,
    pcie_bytes_per_s=5.0,
    ssd_bytes_per_s=1.0,
)
RATES = Hardware(
    disk_bytes_per_s=2e9,
    cached_bytes_per_s=1e10,
    memory_bytes_per_s=30e9,
    exact_bytes_per_s=2e10,
    fast_bytes_per_s=0.0,
    layer_s=1e-4,
)
WITH_GPU = replace(RATES, gpu_bytes_per_s=1e12, pcie_bytes_per_s=2e10)


@pytest.fixture
def problem():
    return Problem.from_loads(np.arange(1.0, 9.0)[None], Cluster.grid(1, 1))


@given(seed=st.integers(0, 200))
def test_tiers_are_optimal_for_equal_sizes(seed):
    use = np.random.default_rng(seed).random((2, 3))
    size = np.ones(2)
    best = min(
        tier_seconds(use, np.array(tiers).reshape(2, 3), MACHINE, size)
        for tiers in itertools.product((0, 1, 2), repeat=6)
        if tiers.count(0) <= 2 and tiers.count(1) <= 2
    )
    assert tier_seconds(use, choose_tiers(use, MACHINE, size), MACHINE, size) == pytest.approx(best)


def test_what_calibrate_writes_is_read(tmp_path, problem):
    WITH_GPU.save(tmp_path / "hardware.toml")
    machine = load_machine(tmp_path / "hardware.toml", gpu_memory="2MB", cpu_memory="3MB")
    assert (machine.ssd_bytes_per_s, machine.dram_bytes_per_s, machine.hbm_bytes_per_s) == (2e9, 30e9, 1e12)
    plan = place_tiers(problem, machine, 1e6)
    assert plan.tier_LE.tolist() == [[2, 2, 2, 1, 1, 1, 0, 0]]
    assert tier_counts(plan) == [2, 3, 3]
    use = np.arange(1.0, 9.0) / 36
    seconds = use * 1e6 * np.array([1 / 2e9 + 1 / 30e9] * 3 + [1 / 30e9] * 3 + [1e-12] * 2)
    assert plan.metadata["seconds_per_token"] == pytest.approx(seconds.sum())


def test_a_file_of_an_older_calibrate_has_no_gpu(tmp_path, problem):
    RATES.save(tmp_path / "hardware.toml")
    lines = (tmp_path / "hardware.toml").read_text().splitlines()
    old = [line for line in lines if not line.startswith(("gpu_", "pcie_", "compressed_"))]
    (tmp_path / "hardware.toml").write_text("\n".join(old))
    machine = load_machine(tmp_path / "hardware.toml", cpu_memory="8MB")
    assert not machine.has_gpu
    assert tier_counts(place_tiers(problem, machine, 1e6)) == [0, 8, 0]
    with pytest.raises(ValueError, match=r"1\.00 GiB of GPU memory were asked for, and the hardware file has no GPU"):
        load_machine(tmp_path / "hardware.toml", gpu_memory="1GiB")
    with pytest.raises(ValueError, match="no GPU, and the tiers put experts there"):
        tier_seconds(np.ones((1, 1)), np.zeros((1, 1), int), machine, np.ones(1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ssd]\nread_bytes_per_s = 2e9\n[ram]\nbytes_per_s = 3e10\n", "expected the keys"),
        ("disk_bytes_per_s = 1e9\n", "memory_bytes_per_s"),
        ("=", "not TOML"),
    ],
)
def test_other_keys_are_refused(tmp_path, text, words):
    (tmp_path / "hardware.toml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_machine(tmp_path / "hardware.toml")


def test_unread_keys_are_refused(tmp_path):
    WITH_GPU.save(tmp_path / "hardware.toml")
    with open(tmp_path / "hardware.toml", "a") as file:
        file.write("my_ssd_bytes_per_s = 9e9\n")
    with pytest.raises(ValueError, match="my_ssd_bytes_per_s"):
        load_machine(tmp_path / "hardware.toml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ssd_bytes_per_s": 0.0}, "ssd_bytes_per_s must be positive"),
        ({"hbm_bytes_per_s": -1.0}, "rates must not be negative"),
        ({"cpu_bytes": -1.0}, "budgets must not be negative"),
        ({"hbm_bytes_per_s": 0.0}, "has no GPU"),
        ({"hbm_bytes_per_s": 0.0, "gpu_bytes": 0.0, "cpu_computes": False}, "no GPU that they could be fetched to"),
    ],
)
def test_impossible_machines_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(MACHINE, **changes)


@pytest.mark.parametrize("size", [np.ones(3), -1.0, np.zeros(1)])
def test_impossible_expert_sizes_are_refused(problem, size):
    with pytest.raises(ValueError, match="expert_bytes must be"):
        place_tiers(problem, MACHINE, size)


def test_several_gpus_are_another_question():
    with pytest.raises(ValueError, match="one machine with one GPU"):
        place_tiers(Problem.from_loads(np.ones((1, 4)), Cluster.grid(1, 2)), MACHINE, 1.0)


def test_robust_tiers_keep_what_any_scenario_needs():
    loads = {"a": np.array([[8.0, 0.5, 1.5, 2.0]]), "b": np.array([[0.0, 0.0, 6.0, 6.0]])}
    problem = Problem.from_loads(loads, Cluster.grid(1, 1))
    machine = replace(MACHINE, gpu_bytes=1.0, cpu_bytes=0.0)
    by_mean = place_tiers(problem, machine, 1.0).tier_LE[0].tolist()
    robust = place_tiers(problem, machine, 1.0, robust=True).tier_LE[0].tolist()
    assert (by_mean.index(0), robust.index(0)) == (0, 0)
    assert robust.count(2) == 3


@pytest.mark.parametrize(("text", "slots"), [("8G", 8), ("8GiB", 8), ("8GB", 7), ("8g", 8)])
def test_a_bare_letter_is_binary_in_every_command(tmp_path, text, slots):
    """8G is 8 GiB: eight experts of 1 GiB fit; 8 GB hold seven."""
    RATES.save(tmp_path / "hardware.toml")
    (tmp_path / "loads.json").write_text('{"logical_count": [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0.5]]}')
    arguments = ["tiers", "--loads", tmp_path / "loads.json", "--hardware", tmp_path / "hardware.toml"]
    arguments += ["--expert-size", "1GiB", "--cpu-memory", text, "--out", tmp_path / "plan.json"]
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    assert tier_counts(Plan.load(tmp_path / "plan.json"))[1] == slots
    assert f"in RAM {slots} ({slots}.00 GiB)" in " ".join(done.output.split())
