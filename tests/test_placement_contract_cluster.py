import numpy as np
import pytest

from placement import Cluster, Problem, load_cluster
from routing.ground.quantity import parse_bytes, parse_bytes_per_s, parse_flops, parse_seconds

CLUSTER = """
version: 1
model: {experts: 16, top_k: 2, expert_groups: 4, hidden: 64, moe_intermediate: 32, expert_bytes: 1e6}
gpu_types: {a: {memory: 80GiB, hbm: 3.35TB/s, flops: {bf16: 989T}}}
node_types: {n: {gpus: {type: a, count: 4}, nvlink: 450GB/s, nic: {count: 4, bandwidth: 400Gb/s}}}
nodes: [{type: n, count: 2}]
links: {inter_node: {latency: 5us, bandwidth: nic}}
ep: {size: 8}
"""


@pytest.fixture
def cluster_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def test_quantities():
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("44.1e6") == 44.1e6
    assert parse_bytes_per_s("3.35TB/s") == 3.35e12
    assert parse_bytes_per_s("400Gb/s") == 50e9
    assert parse_seconds("5us") == 5e-6
    assert parse_flops("1979T") == parse_flops("1979TFLOPS") == 1979e12
    for parse in (parse_bytes, parse_bytes_per_s, parse_seconds, parse_flops):
        with pytest.raises(ValueError, match="such as"):
            parse("3 bananas")


def test_cluster_file_gives_arrays(cluster_file):
    cluster = load_cluster(cluster_file)
    assert cluster.num_gpus == 8
    assert cluster.num_nodes == 2
    assert cluster.node_G.tolist() == [0] * 4 + [1] * 4
    assert cluster.nic_bytes_per_s_G[0] == 50e9
    assert cluster.node_link_ratio == 9
    assert cluster.memory_bytes_G[0] == 80 * 2**30
    assert Cluster.from_json(cluster.to_json()).to_json() == cluster.to_json()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ep: {size: 8}", "ep: {size: 8, slotz: 3}", "ep.slotz: unknown key"),
        ("ep: {size: 8}", "ep: {size: 9}", "have only 8 GPUs"),
        ("80GiB", "80 bananas", "expected a size such as 80GiB"),
        ("type: n, count: 2", "type: m, count: 2", "unknown node type 'm'"),
        ("version: 1", "version: 2", "version"),
        ("nodes: [", "nodes: {", "not readable as YAML"),
    ],
)
def test_bad_cluster_files_are_explained(cluster_file, old, new, words):
    cluster_file.write_text(CLUSTER.replace(old, new))
    with pytest.raises(ValueError, match=words):
        load_cluster(cluster_file)


@pytest.mark.parametrize(
    ("replicas", "words"),
    [(1, "use --replicas 0 or 8"), (-1, "0 or more"), (16 * 7 + 8, "use at most --replicas 112")],
)
def test_infeasible_replicas_name_the_nearest_feasible_choice(cluster_file, replicas, words):
    with pytest.raises(ValueError, match=words):
        Problem.from_loads(np.ones((3, 16)), load_cluster(cluster_file), replicas=replicas)


def test_more_gpus_than_experts_asks_for_replicas():
    with pytest.raises(ValueError, match="use --replicas 9744"):
        Problem.from_loads(np.ones((2, 256)), Cluster.grid(1250, 8))


def test_too_little_memory_names_what_fits(cluster_file):
    cluster_file.write_text(CLUSTER.replace("80GiB", "5MB"))
    with pytest.raises(ValueError, match="1 slots fit: use at least 16 GPUs"):
        Problem.from_loads(np.ones((3, 16)), load_cluster(cluster_file))


def test_model_section_must_match_the_data(cluster_file):
    with pytest.raises(ValueError, match=r"model.experts = 16, the routing data has 32"):
        Problem.from_loads(np.ones((3, 32)), load_cluster(cluster_file))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("memory: 80GiB", "memory: 80", "80 would be 80 bytes; write the unit, for instance 80GiB"),
        ("memory: 80GiB", "memory: '80'", "80 would be 80 bytes"),
        ("hbm: 3.35TB/s", "hbm: 3.35", "3.35 would be 3.35 bytes per second; write the unit, for instance 3.35GB/s"),
        ("nvlink: 450GB/s", "nvlink: 900", "900 would be 900 bytes per second"),
        ("bandwidth: 400Gb/s", "bandwidth: 400", "400 would be 400 bytes per second"),
        ("bandwidth: 400Gb/s", "bandwidth: 400G", r"400G is bytes or bits\? write 400GB/s or 400Gb/s"),
        ("bandwidth: 400Gb/s", "bandwidth: 400 G/s", r"is bytes or bits\? write 400GB/s or 400Gb/s"),
        ("expert_bytes: 1e6", "dtype: fp7", "model.dtype"),
    ],
)
def test_numbers_without_a_unit_are_asked_about(cluster_file, old, new, words):
    assert old in CLUSTER
    cluster_file.write_text(CLUSTER.replace(old, new))
    with pytest.raises(ValueError, match=words):
        load_cluster(cluster_file)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("50000000000", 5e10), ("50e9", 5e10), ("50GB/s", 5e10), ("400Gbps", 5e10), ("46GiB/s", 46 * 2**30)],
)
def test_whole_bytes_and_units_are_taken(cluster_file, text, bytes_per_s):
    cluster_file.write_text(CLUSTER.replace("bandwidth: 400Gb/s", f"bandwidth: {text}"))
    assert load_cluster(cluster_file).nic_bytes_per_s_G[0] == bytes_per_s


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ({"hidden": 7168, "moe_intermediate": 2048}, 3 * 7168 * 2048),
        ({"hidden": 7168, "moe_intermediate": 2048, "dtype": "bf16"}, 6 * 7168 * 2048),
        ({"hidden": 64, "moe_intermediate": 32, "dtype": "fp4"}, 3 * 64 * 32 / 2),
        ({"hidden": 64, "moe_intermediate": 32, "expert_bytes": "44MB"}, 44e6),
        ({"hidden": 64}, None),
        ({}, None),
    ],
)
def test_the_size_of_an_expert_is_given_or_derived(model, size):
    assert Cluster.grid(1, 2, model=model).model.bytes_per_expert == size


def test_derived_sizes_are_checked_against_the_memory(cluster_file):
    """58 layers x 208 slots of 44 MB on 80 GiB were once accepted, as nobody had written expert_bytes."""
    text = CLUSTER.replace(
        "hidden: 64, moe_intermediate: 32, expert_bytes: 1e6", "hidden: 7168, moe_intermediate: 2048"
    )
    cluster_file.write_text(text)
    cluster = load_cluster(cluster_file)
    assert Problem.from_loads(np.ones((58, 16)), cluster).slots_per_gpu == 2
    with pytest.raises(
        ValueError, match=r"80\.00 GiB for experts, but 16 slots x 128 layers x 42\.00 MiB need 84\.00 GiB"
    ):
        Problem.from_loads(np.ones((128, 16)), cluster, replicas=16 * 7)
