import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from placement import Cluster, Problem, read_loads, solve
from placement.commands.report import traffic_GG, write_report
from placement.data.generators import generate_loads, generate_trace
from placement.data.load_importers import import_loads
from placement.data.topology import read_nccl_topology, read_nvidia_smi_topo


def test_loads_of_engines(tmp_path):
    count = np.arange(12.0).reshape(2, 2, 3)
    torch.save({"rank": 0, "logical_count": torch.tensor(count)}, tmp_path / "s.pt")
    np.testing.assert_array_equal(import_loads(tmp_path / "s.pt", "sglang"), count.sum(axis=0))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "meta_info.json").write_text('{"num_experts": 3, "num_experts_per_token": 1}')
    for rank in range(2):
        save_file(
            {"100_3": np.array([1, 2, 3]), "101_3": np.array([1, 0, 0])}, tmp_path / "t" / f"rank{rank}.safetensors"
        )
    np.testing.assert_array_equal(import_loads(tmp_path / "t", "tensorrt-llm")[3], [4, 4, 6])
    line = {"record_type": "eplb_load_stats", "expert_load": [[1, 2, 3, 4]], "p2l_map": [[0, 1, 2, 0]]}
    (tmp_path / "v.jsonl").write_text(json.dumps(line))
    assert import_loads(tmp_path / "v.jsonl", "vllm").tolist() == [[5, 2, 3]]


@pytest.mark.parametrize(
    "text", ["{}", '{"logical_count": [[1], [1, 2]]}', '{"logical_count": [[-1]]}', "[", '{"logical_count": 3}']
)
def test_bad_loads_are_explained(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ValueError, match=r"l\.json"):
        read_loads(tmp_path / "l.json")


def test_topologies(tmp_path):
    smi = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPIX\t0-31\nGPU1\tNV18\t X \tSYS\t0-31\nNIC0\tPIX\tSYS\t X\n"
    )
    (tmp_path / "topo.txt").write_text(smi)
    cluster = Cluster.from_mapping(read_nvidia_smi_topo(tmp_path / "topo.txt", nodes=3))
    assert (cluster.num_gpus, cluster.num_nodes, cluster.nvlink_bytes_per_s_G[0]) == (6, 3, 450e9)
    xml = (
        '<system version="1"><cpu numaid="0"><pci><gpu dev="0" sm="90" rank="0"><nvlink count="18"/></gpu></pci>'
        '<pci><nic><net name="mlx5_0" speed="400000" guid="1"/></nic></pci></cpu></system>'
    )
    (tmp_path / "n.xml").write_text(xml)
    cluster = Cluster.from_mapping(read_nccl_topology(tmp_path / "n.xml"))
    assert cluster.nvlink_bytes_per_s_G[0] == 18 * 26.5e9
    assert cluster.nic_bytes_per_s_G[0] == 50e9
    (tmp_path / "n.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><system/>')
    with pytest.raises(ValueError, match="entities"):
        read_nccl_topology(tmp_path / "n.xml")


def test_generated_loads_are_as_skewed_as_measured_ones():
    load = generate_loads(layers=20)
    skew = load[3:].max(axis=1) / load[3:].mean(axis=1)
    assert not load[:3].any()
    assert 4 < np.median(skew) < 16


def test_report_is_one_file_without_outside_references(tmp_path):
    trace = generate_trace(tokens=300, layers=2, experts=8, top_k=2, blocks=4, tokens_per_sequence=10)
    problem = Problem.from_trace(trace, Cluster.grid(2, 2))
    plan = solve(problem, solver="lpt")
    write_report(problem, plan, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert traffic_GG(plan, trace).sum() == pytest.approx(plan.certificate.in_sample["gpu_fanout"])
