"""`place check` in this process: it accepts what solvers write, and tells every figure that does not hold."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from placement import Plan, generate_loads, generate_trace
from placement.cli import app

MODEL = "model: {experts: 16, top_k: 3, hidden: 256, moe_intermediate: 128, expert_bytes: 1e5}"
CLUSTER = f"""
{MODEL}
gpu_types: {{g: {{memory: 1GiB}}}}
node_types: {{n: {{gpus: {{type: g, count: 2}}}}}}
nodes: [{{type: n, count: 2}}]
ep: {{slots_per_gpu: 5, batch_tokens: 64, tokens_per_gpu: 32, dispatch: uniform}}
"""
TIERS = f"""
{MODEL}
gpu_types: {{g: {{memory: 1MB}}}}
node_types:
  n: {{gpus: {{type: g, count: 2}}, dram: {{size: 2MB, bandwidth: 50GB/s}}, ssd: {{size: 9MB, bandwidth: 3GB/s}}}}
nodes: [{{type: n}}]
tiers: {{batch: 4}}
"""
TRACE_OBJECTIVES = {
    "latency": "uniform",
    "latency+2*balance": "nearest",
    "batches": "quota",
    "batches+0.5*activated": "nearest",
    "balance<=1.2,fanout+balance": "nearest",
    "hops": "uniform",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("check")
    generate_trace(tokens=260, layers=3, experts=16, top_k=3, blocks=4, tokens_per_sequence=13).save(place / "t.npz")
    for name, drift in (("decode", 0.0), ("prefill", 0.8), ("chat", 0.4)):
        load = generate_loads(layers=3, dense_layers=1, experts=16, tokens=1e4, drift=drift)
        (place / f"{name}.json").write_text(json.dumps({"logical_count": load.tolist()}))
    for policy in ("uniform", "nearest", "quota"):
        (place / f"{policy}.yaml").write_text(CLUSTER.replace("dispatch: uniform", f"dispatch: {policy}"))
    (place / "tiers.yaml").write_text(TIERS)
    return place


def run(*arguments):
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    return done.exit_code, " ".join(done.output.split()), done.exception


def solved(folder, policy, *options):
    code, said, error = run("solve", "--cluster", folder / f"{policy}.yaml", "--out", folder / "p.json", "--solver",
                            "lpt", "--time-limit", 1, *options)  # fmt: skip
    assert code == 0, f"{said} {error}"


def figures(folder, *options):
    """Verdict of each figure, and the exit code."""
    code, said, error = run("check", folder / "p.json", "--json", folder / "c.json", *options)
    assert (folder / "c.json").exists(), f"{said} {error}"
    found = json.loads((folder / "c.json").read_text())
    (folder / "c.json").unlink()
    assert found["holds"] == (code == 0)
    return {one["name"]: one for one in found["figures"]}, code


def tamper(folder, change):
    value = json.loads((folder / "p.json").read_text())
    change(value)
    (folder / "p.json").write_text(json.dumps(value))


@pytest.mark.parametrize("objective", TRACE_OBJECTIVES)
def test_objectives_and_dispatch_rules_are_derived(folder, objective):
    """Whatever is minimised under whatever rule: the figure of the solver is found again, and a wrong one is not."""
    policy = TRACE_OBJECTIVES[objective]
    solved(folder, policy, "--trace", folder / "t.npz", "--objective", objective)
    found, code = figures(folder, "--trace", folder / "t.npz")
    assert code == 0
    name = f"objective {objective}"
    assert found[name]["verdict"] == "holds"
    assert found[name]["derived"] == pytest.approx(Plan.load(folder / "p.json").certificate.objective, rel=1e-9)
    is_open = {one for one, figure in found.items() if figure["verdict"] == "not derived"}
    assert is_open <= ({"gpu_fanout", "node_fanout", "hops"} if policy == "quota" else set()) | {"bound"}
    tamper(folder, lambda value: value["certificate"].update(objective=value["certificate"]["objective"] * 0.999))
    found, code = figures(folder, "--trace", folder / "t.npz")
    assert (code, found[name]["verdict"]) == (1, "does not hold")


@pytest.mark.parametrize("robustness", ["max", "mean", "cvar"])
def test_scenarios_are_joined_as_the_certificate_says(folder, robustness):
    data = [option for name in ("decode", "prefill", "chat") for option in ("--loads", folder / f"{name}.json")]
    solved(folder, "uniform", *data, "--robustness", robustness)
    found, code = figures(folder, *data)
    assert code == 0
    assert {figure["verdict"] for figure in found.values()} == {"holds"}
    other = "mean" if robustness == "max" else "max"
    tamper(folder, lambda value: value["certificate"].update(robustness=other))
    assert figures(folder, *data)[1] == 1


def test_churn_and_held_out_data_are_derived(folder):
    data = ("--loads", folder / "decode.json")
    solved(folder, "uniform", *data)
    (folder / "p.json").rename(folder / "before.json")
    solved(folder, "uniform", "--loads", folder / "prefill.json", "--current", folder / "before.json",
           "--objective", "balance+3*churn", "--validate", folder / "chat.json")  # fmt: skip
    given = ("--loads", folder / "prefill.json", "--current", folder / "before.json")
    found, code = figures(folder, *given, "--validate", folder / "chat.json")
    assert code == 0
    assert found["objective balance+3*churn"]["verdict"] == "holds"
    held = f"balancedness on {folder / 'chat.json'}"
    assert found[held]["verdict"] == "holds"
    assert figures(folder, *given[:2])[0]["objective balance+3*churn"]["verdict"] == "not derived"
    tamper(
        folder, lambda value: value["certificate"]["out_of_sample"][str(folder / "chat.json")].update(balancedness=1)
    )
    found, code = figures(folder, *given, "--validate", folder / "chat.json")
    assert (code, found[held]["verdict"]) == (1, "does not hold")


def test_a_holdout_is_split_again(folder):
    solved(folder, "uniform", "--trace", folder / "t.npz", "--holdout", 0.3, "--seed", 5, "--objective", "fanout")
    found, code = figures(folder, "--trace", folder / "t.npz")
    assert code == 0
    assert found["gpu_fanout on held-out sequences"]["verdict"] == "holds"
    tamper(folder, lambda value: value["metadata"]["holdout"].update(seed=6))
    assert figures(folder, "--trace", folder / "t.npz")[1] == 1


CHANGES = {
    "an expert less": lambda value: value["physical_to_logical_map"].__setitem__(0, [0] * 20),
    "more GPUs": lambda value: value.update(num_gpus=8),
    "a smaller gap": lambda value: value["certificate"].update(gap=0.0, proven_optimal=True),
    "other loads": lambda value: value["metadata"]["load"][0].reverse(),
    "another name": lambda value: value.update(objective_name="activated"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_file_says_beside_the_certificate(folder, name):
    solved(folder, "uniform", "--loads", folder / "decode.json")
    tamper(folder, CHANGES[name])
    assert figures(folder, "--loads", folder / "decode.json")[1] == 1


def test_machines_are_those_of_the_cluster_file(folder):
    solved(folder, "uniform", "--loads", folder / "decode.json")
    given = ("--cluster", folder / "uniform.yaml")
    assert figures(folder, *given)[1] == 0
    tamper(folder, lambda value: value["cluster"]["speed_G"].__setitem__(0, 3.0))
    found, code = figures(folder, *given)
    assert (code, found["machines of the cluster file"]["verdict"]) == (1, "does not hold")


@pytest.mark.parametrize("data", ["trace", "nothing"])
def test_plans_with_tiers(folder, data):
    given = ("--trace", folder / "t.npz") if data == "trace" else ()
    model = () if given else (write_model(folder),)
    code, said, error = run("tiers", *model, "--cluster", folder / "tiers.yaml", *given, "--time-limit", 1,
                            "--solver", "search", "--out", folder / "p.json")  # fmt: skip
    assert code == 0, f"{said} {error}"
    found, code = figures(folder, *given)
    assert code == 0
    assert {figure["verdict"] for figure in found.values()} == {"holds"}
    assert found["bound"]["derived"] > 0
    tamper(folder, lambda value: value["tier"][0].__setitem__(0, (value["tier"][0][0] + 1) % 3))
    found, code = figures(folder, *given)
    assert (code, found["a home for every expert"]["verdict"]) == (1, "does not hold")


def write_model(folder):
    """A model of which only the heads of its files are read."""
    place = folder / "model"
    place.mkdir(exist_ok=True)
    sizes = {f"model.layers.{layer}.mlp.experts.gate_up_proj": [16, 100, 500] for layer in range(3)}
    numbers = {name: np.zeros(shape, np.float16) for name, shape in sizes.items()}
    save_file(numbers, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "num_experts_per_tok": 3}))
    return place


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["certificate"].update(objective="x"), "objective must be a finite number"),
        (lambda value: value["certificate"].update(gap_L=[None]), "gap_L must be a list of numbers"),
        (lambda value: value["certificate"].update(robustness="worst"), "robustness must be one of mean, max, cvar"),
        (lambda value: value.update(certificate=[1]), "certificate: expected a mapping"),
        (lambda value: value.pop("num_experts"), "missing keys"),
    ],
)
def test_damaged_files_are_refused(folder, change, words):
    solved(folder, "uniform", "--loads", folder / "decode.json")
    tamper(folder, change)
    code, _, error = run("check", folder / "p.json")
    assert isinstance(error, ValueError)
    assert words in str(error)
    assert code == 1  # of the runner: `expertier` turns it into 2


def test_wrong_data_are_refused(folder):
    solved(folder, "uniform", "--loads", folder / "decode.json", "--validate", folder / "chat.json")
    generate_trace(tokens=60, layers=2, experts=16, top_k=3, blocks=4).save(folder / "other.npz")
    assert "the data has 2 x 16" in str(run("check", folder / "p.json", "--trace", folder / "other.npz")[2])
    wrong = run("check", folder / "p.json", "--validate", folder / "prefill.json")[2]
    assert "the certificate has metrics on" in str(wrong)
