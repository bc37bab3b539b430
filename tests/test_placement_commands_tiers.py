"""`place tiers`, `part`, `score` and `solve` with lower tiers, as a user runs them; sizes read from a checkpoint."""

import json
import struct

import numpy as np
import pytest
from typer.testing import CliRunner

from placement import Plan, generate_trace
from placement.cli import app
from placement.commands.inputs import read_problem
from placement.data.model_folder import read_model_experts
from placement.solving import what_if
from routing.ground.hardware import Hardware

CLUSTER = """
model: {expert_bytes: 1e6, hidden: 64, moe_intermediate: 64}
gpu_types: {g: {memory: 3MB}}
node_types: {n: {gpus: {type: g, count: 2}, dram: {size: 4MB, bandwidth: 30GB/s}, ssd: {size: 1GB, bandwidth: 2GB/s}}}
nodes: [{type: n, count: 2}]
tiers: {batch: 4}
"""


def run(*arguments):
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.output.split())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "c.yaml").write_text(CLUSTER)
    generate_trace(tokens=300, layers=3, experts=8, top_k=2, blocks=2, seed=1).save(tmp_path / "t.npz")
    generate_trace(tokens=300, layers=3, experts=8, top_k=2, blocks=2, seed=2).save(tmp_path / "other.npz")
    return tmp_path


def test_tiers_of_a_cluster_are_solved_scored_and_divided(folder):
    said = run("tiers", "--trace", folder / "t.npz", "--cluster", folder / "c.yaml", "--time-limit", 0.5, "--chunk", 16,
               "--out", folder / "p.json", "--json", folder / "r.json")  # fmt: skip
    assert "experts on GPU 12 (11.44 MiB), in RAM 8" in said
    report = json.loads((folder / "r.json").read_text())
    assert 0 <= report["gap"] < 1
    assert sum(row["experts"] for row in report["memories"]) == 24
    assert len(Plan.load(folder / "p.json").metadata["seconds_per_step"]) == 2
    run("score", folder / "p.json", "--trace", folder / "other.npz", "--json", folder / "s.json")
    score = json.loads((folder / "s.json").read_text())
    assert score["bound"] <= score["objective"] <= score["replayed"]["at home: mean s"] * (1 + 1e-9)
    assert 0 <= score["replayed"]["cached: hit rate"] <= 1
    run("part", folder / "p.json", "--node", 1, "--out", folder / "n.json")
    assert Plan.load(folder / "n.json").tier_LE is not None


def test_solve_puts_what_does_not_fit_on_lower_tiers(folder):
    arguments = ("solve", "--trace", folder / "t.npz", "--cluster", folder / "c.yaml", "--time-limit", 0.5, "--out",
                 folder / "p.json")  # fmt: skip
    assert "the rest goes to host memory and SSDs" in run(*arguments)
    done = CliRunner().invoke(app, [str(one) for one in (*arguments, "--objective", "fanout")])
    assert "--objective is of plans that keep all of them there" in str(done.exception)
    wrong = ("score", folder / "p.json", "--trace", folder / "t.npz", "--objective", "balance")
    done = CliRunner().invoke(app, [str(one) for one in wrong])
    assert "judged by seconds" in str(done.exception)
    done = CliRunner().invoke(app, ["export", str(folder / "p.json"), "--format", "sglang", "--out", str(folder / "e")])
    assert "keeps every expert on GPUs" in str(done.exception)


def test_the_page_of_tiers_tells_memories_prices_and_what_more_would_bring(folder, monkeypatch):
    """GPUs are full and bind; one more holds experts that were in host memory, so the step gets faster."""
    monkeypatch.setattr(what_if.what_more_brings, "__defaults__", (0.3,))
    common = ("--trace", folder / "t.npz")
    for name, batch in (("p", 4), ("q", 32)):
        run("tiers", *common, "--cluster", folder / "c.yaml", "--time-limit", 0.5, "--batch", batch, "--out",
            folder / f"{name}.json")  # fmt: skip
    run("report", folder / "p.json", *common, "--out", folder / "r.html")
    page = (folder / "r.html").read_text()
    assert "http" not in page
    for words in ("What is where", "What binds", "one more GPU on node 0", "64 GiB more host memory", "<td>full</td>"):
        assert words in page
    plan = Plan.load(folder / "p.json")
    larger = what_if.with_gpu(plan.cluster, 0)
    assert larger.node_G.tolist() == [0, 0, 0, 1, 1]
    assert larger.memory_bytes_G.tolist() == [3e6] * 5
    problem = read_problem(folder / "t.npz", None, None, plan.cluster, None, spare_slots=True)
    gpu, memory = what_if.what_more_brings(problem, plan)
    assert gpu.seconds < plan.certificate.objective
    assert memory.bound <= memory.seconds
    done = CliRunner().invoke(
        app, [str(o) for o in ("report", folder / "p.json", *common, "--against", folder / "q.json", "--out", "x.html")]
    )
    assert "the same machines" in str(done.exception)
    run("report", folder / "p.json", *common, "--against", folder / "p.json", "--out", folder / "r.html")
    assert "0 experts have another home there" in (folder / "r.html").read_text()


def write_checkpoint(folder, layers=2, experts=4, size=1000):
    """Headers and zeros of a safetensors file: one tensor per expert, a shared expert that does not count."""
    tensors, offset = {}, 0
    for layer in range(layers):
        names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for e in range(experts)]
        for name in (*names, f"model.layers.{layer}.mlp.shared_expert.up_proj.weight"):
            tensors[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
            offset += size
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(offset))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "num_experts_per_tok": 2}))


def test_sizes_come_from_a_checkpoint_without_loading_it(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    write_checkpoint(model)
    found = read_model_experts(model)
    assert (found.experts_per_layer, found.expert_bytes, found.top_k) == ((4, 4), (1000.0, 1000.0), 2)
    Hardware(disk_bytes_per_s=2e9, cached_bytes_per_s=1e10, memory_bytes_per_s=3e10, exact_bytes_per_s=2e10,
             fast_bytes_per_s=0.0, layer_s=1e-4).save(tmp_path / "hw.toml")  # fmt: skip
    said = run("tiers", model, "--hardware", tmp_path / "hw.toml", "--cpu-memory", "3000", "--out", tmp_path / "p.json")
    assert "in RAM 3 (2.93 KiB), on SSD 5" in said
    assert "gap 0.000%" in said
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_model_experts(model)


def test_batches_are_judged_by_every_rule(folder):
    (folder / "flat.yaml").write_text("node_types: {n: {gpus: {count: 4}}}\nnodes: [{type: n}]\n")
    options = ("--replicas", 4, "--objective", "batches", "--time-limit", 0.5, "--out", folder / "b.json")
    run("solve", "--trace", folder / "t.npz", "--cluster", folder / "flat.yaml", *options)
    said = run("score", folder / "b.json", "--trace", folder / "other.npz", "--batch-tokens", 32, "--shared-experts", 1,
               "--json", folder / "s.json")  # fmt: skip
    batches = json.loads((folder / "s.json").read_text())["batches"]
    assert set(batches) == {"uniform", "static", "nearest", "lp", "lp, shared experts fill up"}
    assert batches["lp"]["mean"] <= batches["uniform"]["mean"]
    assert batches["lp, shared experts fill up"]["p95"] <= batches["lp"]["p95"]
    assert "fullest over mean GPU in 9 batches" in said
    assert np.isfinite(batches["static"]["worst"])
