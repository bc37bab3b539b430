"""The commands in this process: options become requests, results become tables, errors one line."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from placement import Plan, generate_loads, generate_trace
from placement.cli import app
from placement.pages.page import write_report

CLUSTER = """
model: {experts: 32, expert_bytes: 1e6}
gpu_types: {g: {memory: 1GiB}}
node_types: {n: {gpus: {type: g, count: 4}}}
nodes: [{type: n, count: 2}]
"""


@pytest.fixture
def folder(tmp_path):
    for name, drift in (("decode", 0.0), ("prefill", 0.8)):
        load = generate_loads(layers=2, dense_layers=1, experts=32, tokens=1e4, drift=drift)
        (tmp_path / f"{name}.json").write_text(json.dumps({"logical_count": load.tolist()}))
    (tmp_path / "c.yaml").write_text(CLUSTER)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def solved(folder, name="plan.json", *more, data="decode.json"):
    done = run("solve", "--loads", folder / data, "--cluster", folder / "c.yaml", "--out", folder / name,
               "--time-limit", 0.3, *more)  # fmt: skip
    assert done.exit_code == 0, done.output + str(done.exception)
    return " ".join(done.output.split())


def test_solve_prints_names_notes_and_writes_the_report(folder):
    said = solved(folder, "plan.json", "--validate", folder / "prefill.json", "--json", folder / "r.json")
    assert "balancedness (prefill.json)" in said
    assert str(folder / "prefill.json") in json.loads((folder / "r.json").read_text())["out_of_sample"]
    assert "note:" not in said
    (folder / "c.yaml").write_text(CLUSTER.replace(", expert_bytes: 1e6", ""))
    assert "note: sizes unknown: memory not checked" in solved(folder)


def test_solve_against_a_running_plan_says_gigabytes(folder):
    solved(folder)
    said = solved(folder, "next.json", "--current", folder / "plan.json", data="prefill.json")
    assert "against the running plan:" in said
    assert "MiB" in said.split("copies move")[1][:16]


def test_several_plans_and_data_make_one_table(folder):
    solved(folder, "ours.json")
    solved(folder, "theirs.json", "--solver", "eplb-global")
    done = run("score", folder / "ours.json", folder / "theirs.json", "--loads", folder / "decode.json", "--loads",
               folder / "prefill.json", "--objective", "balance", "--json", folder / "r.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [
        ["ours.json", "decode.json"],
        ["", "prefill.json"],
        ["theirs.json", "decode.json"],
        ["", "prefill.json"],
    ]
    plans = json.loads((folder / "r.json").read_text())["plans"]
    assert float(rows[0][2]) == pytest.approx(
        plans[str(folder / "ours.json")]["scenarios"][str(folder / "decode.json")]["balancedness"], rel=1e-4
    )
    one = run("score", folder / "ours.json", "--loads", folder / "decode.json", "--json", folder / "one.json")
    assert one.exit_code == 0
    assert {"objective", "bound", "gap", "balancedness"} <= json.loads((folder / "one.json").read_text()).keys()


def test_a_report_says_what_each_row_was_planned_on(folder):
    solved(folder)
    done = run("report", folder / "plan.json", "--loads", folder / "prefill.json", "--out", folder / "r.html")
    assert done.exit_code == 0, done.output
    page = (folder / "r.html").read_text()
    assert "<th>planned on</th><th>judged on</th>" in page
    assert "<tr><td>EPLB</td><td>decode.json</td><td>prefill.json</td>" in page
    assert "<tr><td>EPLB, knowing this data</td><td>this data</td><td>prefill.json</td>" in page
    assert "<h2>Certificate, on decode.json</h2>" in page
    own = run("report", folder / "plan.json", "--loads", folder / "decode.json", "--out", folder / "own.html")
    assert own.exit_code == 0
    assert "knowing this data" not in (folder / "own.html").read_text()


@pytest.mark.slow
def test_a_report_models_milliseconds_where_sizes_are_known(folder):
    solved(folder)
    arguments = (folder / "plan.json", "--loads", folder / "decode.json", "--out", folder / "r.html")
    assert run("report", *arguments).exit_code == 0
    assert "Not told: objective latency needs model.hidden" in (folder / "r.html").read_text()
    (folder / "c.yaml").write_text(CLUSTER.replace("expert_bytes: 1e6", "hidden: 64, moe_intermediate: 32, top_k: 2"))
    solved(folder)
    assert run("report", *arguments).exit_code == 0
    page = (folder / "r.html").read_text()
    assert "dispatch and combine, ms per layer" in page
    assert "4096 tokens per GPU" in page


def test_latency_is_told_with_its_unit(folder):
    (folder / "c.yaml").write_text(CLUSTER.replace("expert_bytes: 1e6", "hidden: 64, moe_intermediate: 32, top_k: 2"))
    assert "s per layer" in solved(folder, "plan.json", "--objective", "latency")


def test_a_report_escapes_names_from_files(folder):
    solved(folder)
    value = json.loads((folder / "plan.json").read_text())
    value["metadata"]["planned_on"] = ["<script>x()"]
    (folder / "plan.json").write_text(json.dumps(value))
    done = run("report", folder / "plan.json", "--loads", folder / "prefill.json", "--out", folder / "r.html")
    assert done.exit_code == 0, done.output
    assert "<script>" not in (folder / "r.html").read_text()


def test_migrate_counts_experts_where_sizes_are_unknown(folder):
    solved(folder)
    solved(folder, "b.json", data="prefill.json")
    done = run("migrate", folder / "plan.json", folder / "b.json", "--out", folder / "s.json")
    assert "MiB moved" in done.output
    for name in ("plan.json", "b.json"):
        value = json.loads((folder / name).read_text())
        value["cluster"]["model"].pop("expert_bytes")
        (folder / name).write_text(json.dumps(value))
    done = run("migrate", folder / "plan.json", folder / "b.json", "--out", folder / "s.json")
    said = " ".join(done.output.split())
    assert "experts moved" in said
    assert "sizes unknown" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--solver", "lsn"), "did you mean 'lns'"),
        (("--objective", "fanoot"), "did you mean 'fanout'"),
        (("--robustness", "maximum"), "unknown robustness 'maximum'"),
        (("--replicas", "3"), "use --replicas 0 or 8"),
        (("--churn-weight", "1"), "--current"),
        (("--rows", "0:10"), "does not go with --loads"),
        (("--holdout", "0.5"), "use --validate FILE"),
        (("--json", "no/such/folder/r.json"), "does not exist; create it first"),
    ],
)
def test_wrong_options_are_named(folder, options, words):
    done = run("solve", "--loads", folder / "decode.json", "--cluster", folder / "c.yaml", "--out", folder / "p.json",
               *options)  # fmt: skip
    assert isinstance(done.exception, ValueError)
    assert words in str(done.exception)
    assert not (folder / "p.json").exists()


@pytest.mark.parametrize("command", ["solve", "score", "report", "migrate", "tiers"])
def test_help_shows_an_example_and_every_option_says_what_it_does(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Example: expertier place {command}" in " ".join(done.output.replace("│", " ").split()).replace("`", "")


def test_the_pareto_front_is_labelled_with_what_it_knew(tmp_path, monkeypatch):
    """With token data a report solves for a front; its prices and time are cut down here."""
    from placement import Cluster, Problem, solve
    from placement.pages import pictures

    monkeypatch.setattr(pictures, "PARETO_PRICES", (0.5,))
    monkeypatch.setattr(
        pictures, "solve", lambda problem, **settings: solve(problem, **{**settings, "time_limit_s": 0.5})
    )
    trace = generate_trace(tokens=200, layers=2, experts=8, top_k=2, blocks=4, tokens_per_sequence=10)
    problem = Problem.from_trace(trace, Cluster.grid(2, 2))
    write_report(problem, solve(problem, solver="lpt"), tmp_path / "r.html", with_pareto=True)
    page = (tmp_path / "r.html").read_text()
    assert "a plan that was made knowing this data" in page
    assert page.count("data:image/png;base64,") == 5


def test_old_plans_without_new_metadata_still_score(folder):
    solved(folder)
    value = json.loads((folder / "plan.json").read_text())
    value["metadata"].pop("planned_on")
    (folder / "plan.json").write_text(json.dumps(value))
    assert Plan.load(folder / "plan.json").metadata.keys() == {"load"}
    assert run("score", folder / "plan.json", "--loads", folder / "decode.json").exit_code == 0
    assert np.isfinite(Plan.load(folder / "plan.json").certificate.objective)
