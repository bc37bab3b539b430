"""Sizes, control groups, and how a budget becomes slots; hardware files and the cost model."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.memory.budget import (
    Needs,
    available_memory,
    cgroup_limit,
    expect_budgets,
    plan_memory,
    spread_slots,
    sufficient_size,
)
from offload.memory.cost import DecodeWork, expected_hit_rate, predict_decode
from offload.memory.groups import cgroup_room
from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size, parse_size

HARDWARE = Hardware(
    disk_bytes_per_s=2e9,
    cached_bytes_per_s=8e9,
    memory_bytes_per_s=30e9,
    exact_bytes_per_s=20e9,
    fast_bytes_per_s=30e9,
    layer_s=0.0,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 << 30), ("1.5 GB", 1_500_000_000), ("512m", 512 << 20), ("2097152", 2 << 20), (5, 5), ("2kib", 2048)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "6 parsecs", "0", 0, "1e9", "77", "6", "1048575"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match=r"size"):
        parse_size(text)


def test_a_bare_number_on_the_command_line_is_not_taken_for_bytes():
    with pytest.raises(ValueError, match="did you mean 6GiB"):
        parse_size("6")
    assert parse_size(77) == 77


def test_sizes_read_back():
    assert format_size(6 << 30) == "6.00 GiB"
    assert format_size(12) == "12 B"


def _group(root, path, name, value):
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value)


def test_cgroup_v2_takes_the_smallest_limit_on_the_way_up(tmp_path):
    _group(tmp_path, "a", "memory.max", "1000000\n")
    _group(tmp_path, "a/b", "memory.max", "max\n")
    process = tmp_path / "cgroup"
    process.write_text("0::/a/b\n")
    assert cgroup_limit(tmp_path, process) == 1_000_000
    _group(tmp_path, "a/b", "memory.max", "500000\n")
    assert cgroup_limit(tmp_path, process) == 500_000


def test_cgroup_v1_and_none(tmp_path):
    _group(tmp_path, "memory/x", "memory.limit_in_bytes", "9223372036854771712\n")
    process = tmp_path / "cgroup"
    process.write_text("5:cpu:/\n4:memory:/x\n0::/\n")
    assert cgroup_limit(tmp_path, process) is None
    _group(tmp_path, "memory/x", "memory.limit_in_bytes", "4096\n")
    assert cgroup_limit(tmp_path, process) == 4096
    assert cgroup_limit(tmp_path, tmp_path / "absent") is None
    assert available_memory() > 0


@pytest.mark.parametrize(
    ("version", "line", "files"),
    [
        (1, "4:memory:/a/b\n", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
        (2, "0::/a/b\n", ("memory.max", "memory.current", "")),
    ],
)
def test_what_neighbours_in_the_group_hold_is_not_available(tmp_path, version, line, files):
    limit, usage, prefix = files
    base, process = "memory/a" if version == 1 else "a", tmp_path / "cgroup"
    process.write_text(line)
    assert cgroup_room(100, tmp_path, process) is None
    _group(tmp_path, f"{base}/b", limit, "max" if version == 2 else "9223372036854771712")
    _group(tmp_path, base, limit, "10000\n")
    _group(tmp_path, base, usage, "7000\n")
    # what the kernel calls cache (version 1) or file (2) has shared memory in it: tmpfs, which stays
    whole = {"cache": 5000, "file": 5000, "shmem": 3000, "active_file": 500, "inactive_file": 1500}
    stat = "".join(f"{prefix}{name} {size}\n" for name, size in whole.items())
    _group(tmp_path, base, "memory.stat", f"rss 1\nactive_file 7\n{stat}")
    # of 10,000 bytes neighbours hold 7,000 - 2,000 of file cache - 100 of our own
    assert cgroup_room(100, tmp_path, process) == 10_000 - 4_900
    _group(tmp_path, base, usage, "99000\n")
    assert cgroup_room(100, tmp_path, process) == 0


def test_memory_high_is_a_limit_too(tmp_path):
    process = tmp_path / "cgroup"
    process.write_text("0::/a\n")
    _group(tmp_path, "a", "memory.max", "10000\n")
    _group(tmp_path, "a", "memory.high", "6000\n")
    assert cgroup_limit(tmp_path, process) == 6000


@given(
    free=st.integers(0, 10_000),
    layers=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=6),
)
def test_slots_fit_and_none_more_would(free, layers):
    sizes, experts = zip(*layers, strict=True)
    least = [1] * len(layers)
    if sum(sizes) > free:
        return
    slots = spread_slots(free, sizes, experts, least)
    left = free - sum(count * size for count, size in zip(slots, sizes, strict=True))
    assert left >= 0
    assert all(1 <= count <= limit for count, limit in zip(slots, experts, strict=True))
    assert all(count == limit or size > left for count, limit, size in zip(slots, experts, sizes, strict=True))


def test_the_budget_that_the_error_names_is_enough():
    needs = Needs(
        process_bytes=400 << 20, weight_bytes=1 << 30, kv_bytes=50 << 20, activation_bytes=9, staging_bytes=16 << 20
    )
    with pytest.raises(ValueError, match=r"give at least ([0-9.]+ GiB)") as refused:
        plan_memory(1 << 30, needs, [16 << 20] * 24, [32] * 24, 4)
    enough = parse_size(str(refused.value).split("give at least ")[1])
    plan = plan_memory(enough, needs, [16 << 20] * 24, [32] * 24, 4)
    assert min(plan.num_slots) >= 4
    assert plan.fixed_bytes + plan.slot_bytes <= plan.limit_bytes
    with pytest.raises(ValueError, match="give at least"):
        plan_memory(enough - (11 << 20), needs, [16 << 20] * 24, [32] * 24, 4)  # a hundredth of a GiB less


@given(
    besides=st.integers(0, 20 << 30),
    layers=st.lists(st.tuples(st.integers(1, 64 << 20), st.integers(1, 12)), min_size=1, max_size=6),
    top_k=st.integers(1, 12),
)
def test_the_least_budget_and_that_of_all_experts_are_exact_to_the_byte(besides, layers, top_k):
    sizes, experts = zip(*layers, strict=True)
    needs = Needs(process_bytes=besides, weight_bytes=0, kv_bytes=0, activation_bytes=0, staging_bytes=0)
    budgets = expect_budgets(needs, sizes, experts, top_k)
    plan_memory(budgets.least_bytes, needs, sizes, experts, top_k)
    with pytest.raises(ValueError, match="too small"):
        plan_memory(budgets.least_bytes - 1, needs, sizes, experts, top_k)
    assert plan_memory(budgets.all_bytes, needs, sizes, experts, top_k).num_slots == experts
    if budgets.all_bytes > budgets.least_bytes:
        fewer = plan_memory(budgets.all_bytes - 1, needs, sizes, experts, top_k)
        assert sum(fewer.num_slots) < sum(experts)


def test_memory_that_nothing_will_use_needs_no_slack():
    needs = Needs(process_bytes=400 << 20, weight_bytes=0, kv_bytes=0, activation_bytes=0, staging_bytes=0)
    plan = plan_memory(100 << 30, needs, [1 << 20], [4], 2)
    assert plan.slack_bytes == 96 << 20
    assert plan.num_slots == (4,)


def test_sizes_that_are_enough_are_rounded_up():
    for nbytes in (1, 689 << 20, (689 << 20) + 1, (1 << 30) - 1, 1 << 30, 5_000_000_001):
        typed = parse_size(sufficient_size(nbytes))
        assert nbytes <= typed <= nbytes + (11 << 20)


def test_cost_by_hand():
    work = DecodeWork(
        num_layers=10, experts_per_layer=4, expert_bytes=15_000_000, resident_bytes=600_000_000, hit_rate=0.5
    )
    assert work.missed_bytes == 300e6
    assert work.active_bytes == 1200e6
    prediction = predict_decode(work, HARDWARE, rate=HARDWARE.exact_bytes_per_s)
    assert prediction.disk_s == pytest.approx(0.15)
    assert prediction.compute_s == pytest.approx(0.06)
    assert prediction.binds == "disk"
    assert prediction.floor_s == pytest.approx(0.15)
    one_layer_ms = [4 * 0.75, 7.5 + 0.75, 15 + 0.75, 22.5 + 0.75, 30 + 0.75]  # with 0 to 4 misses, of 7.5 ms each
    expected_ms = sum(count * ms for count, ms in zip([1, 4, 6, 4, 1], one_layer_ms, strict=True)) / 16
    assert prediction.token_s == pytest.approx(0.03 + 10 * expected_ms / 1000)
    slow_layers = predict_decode(work, replace(HARDWARE, layer_s=0.001), rate=HARDWARE.exact_bytes_per_s)
    # each of the two misses of a layer, on average, takes half a layer's time; none is hidden where the disk binds
    assert slow_layers.token_s == pytest.approx(prediction.token_s + 10 * (0.001 + 2 * 0.0005))
    all_hits = DecodeWork(num_layers=10, experts_per_layer=4, expert_bytes=15_000_000, resident_bytes=0, hit_rate=1.0)
    in_memory = predict_decode(all_hits, HARDWARE, rate=HARDWARE.fast_bytes_per_s)
    assert (in_memory.binds, in_memory.token_s) == ("memory", pytest.approx(0.02))
    compressed = replace(HARDWARE, compressed_bytes_per_s=2 * HARDWARE.exact_bytes_per_s)
    assert predict_decode(work, compressed, rate=compressed.compressed_bytes_per_s).compute_s == pytest.approx(0.03)
    assert predict_decode(work, compressed, rate=compressed.exact_bytes_per_s).compute_s == prediction.compute_s


def test_expected_hit_rate_is_a_rate():
    rates = [expected_hit_rate(share / 10, 4, 32) for share in range(11)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, 1)


def test_hardware_files(tmp_path):
    HARDWARE.save(tmp_path / "h.toml")
    assert Hardware.load(tmp_path / "h.toml") == HARDWARE
    (tmp_path / "h.toml").write_text("disk_bytes_per_s = 1.0\n")
    with pytest.raises(ValueError, match="expected the keys"):
        Hardware.load(tmp_path / "h.toml")
    (tmp_path / "h.toml").write_text("= 1")
    with pytest.raises(ValueError, match="not TOML"):
        Hardware.load(tmp_path / "h.toml")
    with pytest.raises(ValueError, match="expertier calibrate"):
        Hardware.load(tmp_path / "none.toml")


def test_calibration_measures_something(tmp_path):
    from offload.forecast.calibrate import cached_bandwidth, disk_bandwidth

    file = tmp_path / "data"
    file.write_bytes(bytes(8 << 20))
    quick = {"settle_s": 0.0, "seconds": 0.02}
    assert disk_bandwidth(file, num_threads=2, read_bytes=1 << 20, **quick) > 0
    assert disk_bandwidth(file, num_threads=4, read_bytes=8 << 20, **quick) > 0  # fewer pieces than threads
    assert cached_bandwidth(file, 1 << 20) > 0
    with pytest.raises(ValueError, match="too small"):
        disk_bandwidth(file, num_threads=2, read_bytes=16 << 20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_go_back_to_the_system():
    script = (
        "import torch; from offload.memory.budget import resident_bytes; from offload.memory.heap import *\n"
        "return_large_blocks(); [torch.ones(30 << 18) for _ in range(2)]\n"  # frees 30 MiB twice
        "kept = [torch.ones(30 << 18) for _ in range(4)]; small = torch.ones(9); before = resident_bytes()\n"
        "del kept; print(before - resident_bytes()); reuse_blocks()\n"
        "kept = [torch.ones(1 << 18) for _ in range(64)]; before = resident_bytes()\n"  # 1 MiB each, every second stays
        "del kept[::2]; print(before - resident_bytes()); return_free_blocks_beyond(before)\n"
        "print(before - resident_bytes()); return_free_blocks_beyond(0); print(before - resident_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    large, *reused, returned = map(int, done.stdout.split())
    assert large >= 115 << 20
    assert max(reused) <= 1 << 20
    assert returned >= 31 << 20


def test_a_context_that_takes_much_of_a_budget_is_named():
    needs = Needs(process_bytes=0, weight_bytes=0, kv_bytes=4 << 30, activation_bytes=0, staging_bytes=0)
    with pytest.raises(ValueError, match=r"or a smaller --context: keys and values take 4\.00 GiB"):
        plan_memory(5 << 30, needs, [1 << 30] * 2, [8] * 2, 2)
