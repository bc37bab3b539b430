import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from experiments import cli
from placement import Cluster, Problem, read_loads, solve
from placement.commands.inputs import read_problem
from placement.data.generators import generate_loads, generate_trace
from placement.data.load_importers import LOAD_IMPORTERS, import_load_file, import_loads
from placement.data.loads import read_load_file
from placement.pages.page import traffic_GG, write_report


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["expertier", *map(str, arguments)])
    with pytest.raises(SystemExit) as finished:
        cli.main()
    return finished.value.code or 0


def test_loads_of_engines(tmp_path):
    count = np.arange(12.0).reshape(2, 2, 3)
    torch.save({"rank": 0, "logical_count": torch.tensor(count)}, tmp_path / "s.pt")
    np.testing.assert_array_equal(import_loads(tmp_path / "s.pt", "sglang"), count.sum(axis=0))
    line = {"record_type": "eplb_load_stats", "expert_load": [[1, 2, 3, 4]], "p2l_map": [[0, 1, 2, 0]]}
    (tmp_path / "v.jsonl").write_text(json.dumps(line))
    assert import_loads(tmp_path / "v.jsonl", "vllm").tolist() == [[5, 2, 3]]


@pytest.fixture
def tensorrt(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts": 3, "num_experts_per_token": 1}')
    for rank in range(3):
        save_file(
            {"100_3": np.array([1, 2, 3]), "101_3": np.array([1, 0, 0]), "100_5": np.array([0, 0, 0])},
            folder / f"rank{rank}.safetensors",
        )
    return folder


def test_recorded_layers_reach_the_loads_file_and_the_plan(tensorrt, tmp_path, monkeypatch):
    """Layer 5 was recorded and idle, layer 4 is dense: a zero row alone could not tell them apart."""
    assert run(monkeypatch, "place", "loads", tensorrt, "--format", "tensorrt-llm", "--out", tmp_path / "l.json") == 0
    found = read_load_file(tmp_path / "l.json")
    assert found.layer_ids == (3, 5)
    assert found.load_LE[3].tolist() == [6, 6, 9]
    problem = Problem.from_loads(found.load_LE, Cluster.grid(1, 3), layer_ids=found.layer_ids)
    plan = solve(problem, solver="lpt")
    assert (plan.layer_ids, plan.hidden_layers) == ((3, 5), 6)


def test_loads_of_some_ranks_are_noticed(tensorrt, tmp_path):
    (tensorrt / "rank1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks those of ranks \[1\]"):
        import_loads(tensorrt, "tensorrt-llm")
    passes = {"last_physical_to_logical_map": torch.tensor([[0, 1, 0]])}
    for rank in (0, 1):
        record = {"rank": rank, "forward_pass_id": 0, "global_physical_count": torch.tensor([[1, 2, 3 + rank]])}
        torch.save({"records": [record], **passes}, tmp_path / f"p_{rank}.pt")
    with pytest.raises(ValueError, match=r"p_1\.pt lies beside it"):
        import_loads(tmp_path / "p_0.pt", "sglang")
    assert import_loads(tmp_path, "sglang").tolist() == [[9, 4]]
    (tmp_path / "p_0.pt").unlink()
    with pytest.raises(ValueError, match=r"ranks \[1\] and lacks those of \[0\]"):
        import_loads(tmp_path, "sglang")


def test_equal_dumps_of_several_ranks_count_once(tmp_path):
    for rank in range(3):
        torch.save({"rank": rank, "logical_count": torch.tensor([[[1.0, 2.0]]])}, tmp_path / f"s_{rank}.pt")
    assert import_loads(tmp_path, "sglang").tolist() == [[1, 2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_loads_that_are_no_loads_are_refused_everywhere(tmp_path, bad):
    table = [[[1.0, 2.0], [3.0, bad]]]
    torch.save({"logical_count": torch.tensor(table)}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"finite and not negative; got .* at step 0, layer 1, expert 1"):
        import_loads(tmp_path / "s.pt", "sglang")
    with pytest.raises(ValueError, match="not negative"):
        Problem.from_loads(np.array(table[0]), Cluster.grid(1, 2))
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": table}))
    with pytest.raises(ValueError, match=r"l\.json"):
        read_loads(tmp_path / "l.json")
    line = {"record_type": "eplb_load_stats", "expert_load": table[0], "p2l_map": [[0, 1], [1, 0]]}
    (tmp_path / "v.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"v\.jsonl"):
        import_loads(tmp_path / "v.jsonl", "vllm")


@pytest.mark.parametrize("name", LOAD_IMPORTERS)
@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"PK\x03\x04 no zip", b'{"a": 1}\n', b"text\n", b""])
def test_other_files_are_one_clear_line(tmp_path, name, content):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="bad") as error:
        import_load_file(tmp_path / "bad", name)
    assert f"format {name}" in str(error.value)
    assert not any(word in str(error.value) for word in ("KeyError", "codec", "Unpickling", "\n"))


@pytest.mark.parametrize(
    "text",
    [
        "{}", '{"logical_count": [[1], [1, "x"]]}', '{"logical_count": [[-1]]}', "[", '{"logical_count": 3}',
        '{"logical_count": [[NaN]]}', '{"logical_count": [[1]], "layer_ids": [5, 3]}',
        '{"logical_count": [[1], [2]], "layer_ids": [7]}', '{"logical_count": [[1]], "layer_ids": ["a"]}',
    ],
)  # fmt: skip
def test_bad_loads_are_explained(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(ValueError, match=r"l\.json"):
        read_loads(tmp_path / "l.json")


# --- which decoder layer a row is -------------------------------------------------------------------------------------

IDLE = np.array([[0, 0], [1, 2], [0, 0], [3, 4]], float)  # one row without load in the middle, one before


@pytest.mark.parametrize(
    ("load", "recorded", "model", "layer_ids", "hidden"),
    [
        (IDLE, None, {}, (1, 3), 4),
        (IDLE, (1, 2, 3), {}, (1, 2, 3), 4),
        (IDLE, (3, 5, 6, 9), {}, (3, 5, 6, 9), 10),
        (IDLE, None, {"moe_layers": 4}, (0, 1, 2, 3), 4),
        (IDLE, None, {"moe_layers": 3, "first_moe_layer": 1}, (1, 2, 3), 4),
        (IDLE, None, {"moe_layers": 2, "first_moe_layer": 1}, (1, 3), 4),
        (IDLE, None, {"moe_layers": 4, "first_moe_layer": 3}, (3, 4, 5, 6), 7),
        (IDLE, None, {"first_moe_layer": 1, "hidden_layers": 4}, (1, 3), 4),
        (IDLE[1:], None, {"first_moe_layer": 3}, (3, 5), 6),
        (IDLE[1:], None, {"first_moe_layer": 3, "hidden_layers": 9, "moe_layers": 3}, (3, 4, 5), 9),
    ],
)
def test_rows_of_loads_are_the_layers_that_file_or_cluster_say(load, recorded, model, layer_ids, hidden):
    problem = Problem.from_loads(load, Cluster.grid(1, 2, model=model), layer_ids=recorded)
    assert (problem.layer_ids, problem.hidden_layers) == (layer_ids, hidden)
    assert problem.num_layers == len(layer_ids)


@pytest.mark.parametrize(
    ("recorded", "model", "words"),
    [
        ((1, 2), {}, "row 3 has load"),
        ((3, 2, 1, 0), {}, "must rise"),
        (None, {"hidden_layers": 9}, "give model.first_moe_layer"),
        (None, {"first_moe_layer": 2, "hidden_layers": 4}, "row 1 has load"),
        ((3, 5, 6, 9), {"hidden_layers": 9}, "only 9 decoder layers"),
        ((3, 5, 6, 9), {"first_moe_layer": 2}, "the data begins at layer 3"),
        ((0, 1, 2, 3), {"moe_layers": 5}, "moe_layers = 5"),
    ],
)
def test_layer_numbers_that_contradict_are_refused(recorded, model, words):
    with pytest.raises(ValueError, match=words):
        Problem.from_loads(IDLE, Cluster.grid(1, 2, model=model), layer_ids=recorded)


@pytest.mark.parametrize(
    ("metadata", "model", "expected"),
    [
        ({"layer_ids": [3, 5], "hidden_layers": 8}, {}, ((3, 5), 8)),
        ({"layer_ids": [3, 5]}, {"first_moe_layer": 3}, ((3, 5), 6)),
        ({}, {"first_moe_layer": 3}, ((3, 4), 5)),
        ({}, {"first_moe_layer": 3, "hidden_layers": 7}, ((3, 4), 7)),
        ({}, {}, ((0, 1), 2)),
        ({}, {"hidden_layers": 7}, "give model.first_moe_layer"),
        ({"layer_ids": [3, 5]}, {"first_moe_layer": 2}, "begins at layer 3"),
        ({"layer_ids": [3, 5], "hidden_layers": 8}, {"hidden_layers": 9}, "the data has 8"),
    ],
)
def test_layers_of_traces(metadata, model, expected):
    trace = generate_trace(tokens=20, layers=2, experts=4, top_k=2, blocks=2)
    trace.metadata.update(metadata)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            Problem.from_trace(trace, Cluster.grid(1, 2, model=model))
        return
    problem = Problem.from_trace(trace, Cluster.grid(1, 2, model=model))
    assert (problem.layer_ids, problem.hidden_layers) == expected


def test_a_plan_is_not_judged_by_a_trace_of_other_layers(tmp_path):
    trace = generate_trace(tokens=20, layers=2, experts=4, top_k=2, blocks=2)
    trace.metadata["layer_ids"] = [3, 5]
    plan = solve(Problem.from_trace(trace, Cluster.grid(1, 2)), solver="lpt")
    trace.save(tmp_path / "same.npz")
    assert read_problem(tmp_path / "same.npz", None, None, plan.cluster, 0, plan).layer_ids == (3, 5)
    trace.metadata["layer_ids"] = [3, 4]
    trace.save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"decoder layers \[3, 4\], the plan is for \[3, 5\]"):
        read_problem(tmp_path / "other.npz", None, None, plan.cluster, 0, plan)


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
    assert "batches of ep.batch_tokens tokens" in page
    assert "Expected gain over the contiguous layout" in page
    write_report(problem, plan, tmp_path / "r.html", other=solve(problem, solver="random"))
    page = (tmp_path / "r.html").read_text()
    assert "<td>other plan</td>" in page
    assert "Expected gain over the other plan" in page
    assert traffic_GG(plan, trace).sum() == pytest.approx(plan.certificate.in_sample["gpu_fanout"])
