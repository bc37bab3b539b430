"""What every benchmark owes: help, a gate that stops it before a time is shown, one line for a wrong argument."""

import importlib
import inspect
import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_command

from experiments.bench import flax, leverage, routers, starting_points, step, training
from experiments.bench.claims import bench as claims
from experiments.bench.duo import bench as duo
from experiments.bench.layers import memory as memory_layers
from experiments.bench.low_bits import bench as low_bits
from experiments.bench.offloading import contestants
from experiments.bench.serving import bench as serving
from experiments.bench.serving import measures
from experiments.bench.tuning import domains
from experiments.cli import app, bench

NO_GATE = "No parity gate:"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One benchmark.

    Args:
        command: its words after `expertier`.
        wrong: arguments that are refused before anything runs; `{folder}` is an empty folder, `{file}` a file.
        words: of the refusal.
        right: arguments with which its gate runs on something small.
        redden: makes what is timed compute something else; None where the module says why it has no gate.
    """

    command: tuple[str, ...]
    wrong: tuple[str, ...]
    words: str
    right: tuple[str, ...] = ()
    redden: Callable[[pytest.MonkeyPatch], None] | None = None


def redden_flax(monkeypatch):
    pytest.importorskip("jax")
    probe = importlib.import_module("moe.nnx.parts.probe")
    calls_of = probe.grouped_product_calls

    def wrong(*sizes):
        calls = calls_of(*sizes)
        forward = calls["block"]["forward"]
        calls["block"]["forward"] = lambda: [1.1 * one for one in forward()]
        return calls

    monkeypatch.setattr(flax, "SIZES", {"tiny": (2, 8, 4, 6)})
    monkeypatch.setattr(probe, "grouped_product_calls", wrong)


def redden_resident(monkeypatch):
    from experiments.evidence import resident

    right = resident.load_resident

    def wrong(folder, **options):
        model = right(folder, **options)
        model.lm_head.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(resident, "load_resident", wrong)


def redden_kernels(monkeypatch):
    import moe
    from experiments.bench.expert_kernels import shapes

    right = moe.grouped_experts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shapes, "CPU_SHAPES", {"tiny": shapes.LayerShape(width=16, features=8, num_experts=3, top_k=2)})
    monkeypatch.setattr(moe, "grouped_experts", lambda *given: 1.1 * right(*given))


def redden_locality(monkeypatch):
    from experiments.bench.locality import bench as locality
    from experiments.bench.locality import measures
    from experiments.train.presets import preset

    model = preset("smoke").model | {"router": "olmoe"}
    small = replace(preset("smoke"), model=model, steps=1, warmup_steps=0, held_out_tokens=256)
    monkeypatch.setattr(locality, "base_config", lambda tokens: small)
    monkeypatch.setattr(measures, "SOLVE_S", 0.1)
    monkeypatch.setattr(measures, "DECODED_TOKENS", 4)
    load = measures.load_resident

    def wrong(folder):
        resident = load(folder)
        resident.lm_head.weight.data.mul_(1.5)
        return resident

    monkeypatch.setattr(measures, "load_resident", wrong)


def redden_latent_experts(monkeypatch):
    from moe.experts.latent import LatentExperts

    right = LatentExperts.forward
    monkeypatch.setattr(LatentExperts, "forward", lambda *given: right(*given) + 1e-6)


def redden_memory_layers(monkeypatch):
    right = memory_layers._peer_at_once
    monkeypatch.setattr(memory_layers, "_peer_at_once", lambda *given: right(*given) + 1e-6)


def redden_offload(monkeypatch):
    load_model = contestants.load_model

    def wrong(*given: Any) -> Any:
        model = load_model(*given)
        model.lm_head.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(contestants, "load_model", wrong)


def redden_overlap(monkeypatch):
    overlap = importlib.import_module("experiments.placed.overlap")
    right = overlap.TokenParts.woven
    monkeypatch.setattr(overlap.TokenParts, "woven", lambda *given: [1.1 * one for one in right(*given)])


def redden_placement(monkeypatch):
    import placement

    right = placement.eplb
    monkeypatch.setattr(placement, "eplb", lambda *given: right(*given)[:, ::-1])


def redden_tiers(monkeypatch):
    from placement.solving import cluster_tiers

    right = cluster_tiers.tier_model

    def wrong(*given):
        model = right(*given)
        return replace(model, cost_WLEC=1.1 * model.cost_WLEC)

    monkeypatch.setattr(cluster_tiers, "tier_model", wrong)


def redden_forecast(monkeypatch):
    from offload.cache import steps

    call = steps._call
    monkeypatch.setattr(steps, "_call", lambda *given, **named: call(*given, **named) + 1)


def redden_routers(monkeypatch):
    for name, size in (("TOKENS", 64), ("WIDTH", 16), ("EXPERTS", 8), ("TOP_K", 2), ("LAYERS", 2)):
        monkeypatch.setattr(routers, name, size)
    build = routers._build

    def wrong(name):
        built = build(name)
        if name == "classic":
            forward = built[0].forward
            monkeypatch.setattr(built[0], "forward", lambda x_TD, *given: forward(-x_TD, *given))
        return built

    monkeypatch.setattr(routers, "_build", wrong)


def redden_step(monkeypatch):
    models_of = step._models

    def wrong(*given: Any) -> Any:
        models = models_of(*given)
        models[step.OURS].lm_head.weight.data.mul_(1.5)
        return models

    monkeypatch.setattr(step, "_models", wrong)


def redden_pregated(monkeypatch):
    from experiments.bench.systems import pregated

    def decoded(checkpoint, slots, *given, **named):
        return torch.tensor([float(slots)]), {}

    monkeypatch.setattr(pregated, "save_model", lambda *given, **named: None)
    monkeypatch.setattr(pregated, "decoded", decoded)


def redden_products(monkeypatch):
    from offload.compute.orders import Order

    right, calls = Order.multiply, []

    def wrong(self, x, matrices, outs, **given):
        right(self, x, matrices, outs, **given)
        calls.append(outs)
        if len(calls) % 2:
            outs[0].add_(1.0)

    monkeypatch.setattr(Order, "multiply", wrong)


def redden_serve(monkeypatch):
    numbers = itertools.count()

    def answers(engine, rows, *given):
        return {}, [SimpleNamespace(events=[next(numbers)]) for _ in rows]

    monkeypatch.setattr(serving, "_open", lambda *given, **options: nullcontext())
    for measure in ("rates", "one_by_one"):
        monkeypatch.setattr(measures, measure, answers)


def redden_train(monkeypatch):
    as_mixtral = training._as_mixtral

    def wrong(model):
        mixtral = as_mixtral(model)
        mixtral.model.layers[0].mlp.experts.down_proj.data.mul_(1.1)
        return mixtral

    monkeypatch.setattr(training, "_as_mixtral", wrong)


BENCHES = {
    "before-pass": Bench(
        command=("bench", "before-pass"),
        wrong=("--folder", "{folder}", "--limit", "6"),
        words="did you mean 6GiB?",
        right=("--folder", "{folder}"),
        redden=redden_offload,
    ),
    "claim": Bench(
        command=("bench", "claim"),
        wrong=("glidr", "--records", "{folder}"),
        words="unknown claim 'glidr' (did you mean 'glider'?)",
    ),
    "duo": Bench(
        command=("bench", "duo"),
        wrong=("--out", "{folder}/duo", "--budgets", "2,two"),
        words="--budgets takes whole numbers from 0 on with commas between them; got 'two'",
    ),
    "finetune": Bench(
        command=("bench", "finetune"),
        wrong=("{folder}", "--contestant", "lore"),
        words="unknown contestant 'lore' (did you mean 'lora'?)",
        right=("{folder}", "--limit", "none", "--contestant", "zo"),
        redden=redden_resident,
    ),
    "finetune-domains": Bench(
        command=("bench", "finetune-domains"),
        wrong=("--data", "{file}"),
        words="two domains are compared; got 1 of --data",
    ),
    "flax": Bench(
        command=("bench", "flax"),
        wrong=("--preset", "e61"),
        words="unknown preset 'e61'",
        right=("--steps", "0", "--records", "{folder}"),
        redden=redden_flax,
    ),
    "kernels": Bench(
        command=("bench", "kernels"),
        wrong=("--json", "{folder}/missing/table.json"),
        words="does not exist; create it first",
        right=("--tokens", "4"),
        redden=redden_kernels,
    ),
    "leverage": Bench(
        command=("leverage",),
        wrong=("--activation", "2", "--granularity", "12", "--compute", "1e22"),
        words="activation must lie in 0..1; got 2",
    ),
    "load": Bench(
        command=("bench", "load"),
        wrong=("--form", "fp7"),
        words="form must be one of fp8, plain; got 'fp7'",
        right=("--form", "plain", "--size", "1MB", "--layers", "1", "--experts", "2", "--folder", "{folder}"),
        redden=redden_offload,
    ),
    "locality": Bench(
        command=("bench", "locality"),
        wrong=("--out", "{folder}/locality", "--variants", "olmo"),
        words="unknown variant, router or architecture 'olmo'",
        right=("--out", "{folder}/locality", "--variants", "olmoe", "--seeds", "1", "--steps", "1"),
        redden=redden_locality,
    ),
    "low-bits": Bench(
        command=("bench", "low-bits"),
        wrong=("--work", "{file}"),
        words="pyproject.toml is a file; give a folder",
    ),
    "members": Bench(
        command=("bench", "members"),
        wrong=("--folder", "{folder}/missing"),
        words="does not exist; create it first",
        right=("--folder", "{folder}", "--size", "20MB", "--hidden", "128"),
        redden=redden_resident,
    ),
    "latent-experts": Bench(
        command=("bench", "latent-experts"),
        wrong=("--tokens", "none"),
        words="--tokens takes whole numbers from 1 on with commas between them; got 'none'",
        right=("--tokens", "2", "--width", "16"),
        redden=redden_latent_experts,
    ),
    "memory-layers": Bench(
        command=("bench", "memory-layers"),
        wrong=("--experts", "1000"),
        words="--experts takes squares, because keys lie on a square grid; got 1000",
        right=("--experts", "1024"),
        redden=redden_memory_layers,
    ),
    "offload": Bench(
        command=("bench", "offload"),
        wrong=("{folder}", "--contestant", "our"),
        words="unknown contestant 'our' (did you mean 'ours'?)",
        right=("{folder}",),
        redden=redden_offload,
    ),
    "overlap": Bench(
        command=("bench", "overlap"),
        wrong=("--top-k", "17"),
        words="--top-k 17 is more than the 16 experts of a layer",
        right=("--processes", "1", "--tokens", "6", "--layers", "1", "--width", "8", "--inner-width", "8"),
        redden=redden_overlap,
    ),
    "placement": Bench(
        command=("bench", "placement"),
        wrong=("--trace", "{folder}/missing.npz"),
        words="missing.npz",
        right=("--records", "{folder}"),
        redden=redden_placement,
    ),
    "routers": Bench(
        command=("bench", "routers"),
        wrong=("--records", "{file}"),
        words="pyproject.toml is a file; give a folder",
        right=("--repeats", "5"),
        redden=redden_routers,
    ),
    "serve": Bench(
        command=("bench", "serve"),
        wrong=("{folder}", "--measure", "speed"),
        words="unknown measure 'speed'",
        right=("{folder}", "--measure", "rates"),
        redden=redden_serve,
    ),
    "forecast": Bench(
        command=("bench", "forecast"),
        wrong=("--folder", "{folder}/missing"),
        words="no such folder; create it first",
        right=("--folder", "{folder}", "--records", "{folder}"),
        redden=redden_forecast,
    ),
    "tiers": Bench(
        command=("bench", "tiers"),
        wrong=("--trace", "{folder}/missing.npz"),
        words="missing.npz",
        right=("--trace", "{file}", "--records", "{folder}"),
        redden=redden_tiers,
    ),
    "pregated": Bench(
        command=("bench", "pregated"),
        wrong=("--folder", "{folder}/missing"),
        words="does not exist; create it first",
        right=("--folder", "{folder}", "--width", "64"),
        redden=redden_pregated,
    ),
    "products": Bench(
        command=("bench", "products"),
        wrong=("--form", "mxfp5"),
        words="unknown form 'mxfp5'",
        right=("--form", "mxfp4", "--rows", "1", "--size", "1MiB", "--repeats", "2", "--records", "{folder}"),
        redden=redden_products,
    ),
    "starts": Bench(
        command=("bench", "starts"),
        wrong=("--records", "{file}"),
        words="pyproject.toml is a file; give a folder",
    ),
    "step": Bench(
        command=("bench", "step"),
        wrong=("--family", "mixtrl"),
        words="unknown family 'mixtrl' (did you mean 'mixtral'?)",
        right=("--family", "mixtral", "--layers", "1", "--contexts", "4", "--records", "{folder}"),
        redden=redden_step,
    ),
    "streamed": Bench(
        command=("bench", "streamed"),
        wrong=("--folder", "{folder}", "--kind", "sparse"),
        words="kind must be one of dense, experts; got 'sparse'",
        right=("--folder", "{folder}", "--size", "20MB", "--hidden", "128", "--limit", "none"),
        redden=redden_resident,
    ),
    "units": Bench(
        command=("bench", "units"),
        wrong=("--folder", "{folder}/missing"),
        words="does not exist; create it first",
        right=("--folder", "{folder}", "--width", "64", "--units", "64", "--layers", "2"),
        redden=redden_resident,
    ),
    "train": Bench(
        command=("bench", "train"),
        wrong=("--precision", "float8"),
        words="unknown precision 'float8'",
        right=("--preset", "smoke", "--precision", "float32", "--threads", "1"),
        redden=redden_train,
    ),
}
MODULES = {
    "claim": claims,
    "duo": duo,
    "finetune-domains": domains,
    "leverage": leverage,
    "low-bits": low_bits,
    "starts": starting_points,
}


def arguments(parts, folder):
    return [part.format(folder=folder, file=Path(__file__).parent.parent / "pyproject.toml") for part in parts]


def test_every_benchmark_is_in_the_table():
    assert {one.command[-1] for one in BENCHES.values() if one.command[0] == "bench"} == set(
        get_command(bench).commands
    )
    assert "leverage" in get_command(app).commands


@pytest.mark.parametrize("name", BENCHES)
def test_help_has_an_example(name, run, capsys):
    assert run(*BENCHES[name].command, "--help") == 0
    assert "Example:" in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHES)
def test_a_wrong_argument_is_refused_in_one_line(name, run, capsys, tmp_path):
    one = BENCHES[name]
    assert run(*one.command, *arguments(one.wrong, tmp_path)) == 2
    said = capsys.readouterr().err
    assert one.words in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("name", [name for name, one in BENCHES.items() if one.redden is None])
def test_who_has_no_gate_says_why(name):
    assert NO_GATE in inspect.getdoc(MODULES[name])


@pytest.mark.parametrize("name", [name for name, one in BENCHES.items() if one.redden])
def test_nothing_is_shown_where_the_gate_is_red(name, run, capsys, tmp_path, monkeypatch):
    one = BENCHES[name]
    threads = torch.get_num_threads()
    one.redden(monkeypatch)
    assert run(*one.command, *arguments(one.right, tmp_path)) == 1
    shown = capsys.readouterr()
    assert re.search(r"RuntimeError|ParityError", shown.err)
    # one line of error, after what a long bench says of its runs
    assert [line for line in shown.err.splitlines() if line.startswith("expertier: ")] == shown.err.splitlines()[-1:]
    assert "Traceback" not in shown.err
    assert not re.search(r"\d (ms|us|s)\b|tok/s|[│┃|]", shown.out), "no table, no time"
    assert not list(Path(tmp_path).rglob("record.json"))
    assert torch.get_num_threads() == threads
