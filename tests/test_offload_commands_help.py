"""Every command of `expertier`: help with an example, one line for a missing file, text printed as it is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

import experiments.cli
import moe.cli
from routing.traces import RoutingTrace

ROOT = Path(__file__).parent.parent


def _commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(_commands(typer.main.get_command(experiments.cli.app)))
PASSED_ON = {(name,): command for name, command in typer.main.get_command(moe.cli.app).commands.items()}
ALL = COMMANDS | PASSED_ON


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help(path, run, capsys):
    assert run(*path, "--help") == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert "expertier " + " ".join(path) in " ".join(shown.replace("│", " ").split())
    for parameter in ALL[path].params:
        assert parameter.help, f"{' '.join(path)} {parameter.name}"


def test_help_of_the_groups(run, capsys):
    for path in ((), ("trace",), ("place",), ("bench",)):
        assert run(*path, "--help") == 0
    assert "--version" in capsys.readouterr().out


MISSING = {
    "chat": "nowhere",
    "serve": "nowhere",
    "generate": "nowhere --prompt a",
    "pack": "nowhere --out new.experts",
    "dequantise": "nowhere --out new",
    "finetune": "nowhere --data nowhere.txt --method zo --steps 1 --out new",
    "quality": "nowhere --against nowhere --data nowhere",
    "fit": "nowhere",
    "calibrate": "--folder nowhere --out new.toml",
    "simulate": "nowhere.npz --cache-experts 2",
    "trace show": "nowhere.npz",
    "trace import": "nowhere.npz --format npz --out new.npz",
    "trace predictor": "nowhere.npz --out new.npz",
    "trace batches": "nowhere.npz",
    "trace neurons": "nowhere --data nowhere.txt",
    "trace record": "nowhere --data nowhere.txt --out new.npz",
    "place solve": "--cluster nowhere.yaml --trace nowhere.npz --out new.json",
    "place score": "nowhere.json --trace nowhere.npz",
    "place check": "nowhere.json --trace nowhere.npz",
    "place speeds": "nowhere.csv --cluster nowhere.yaml --out new.yaml",
    "place import": "nowhere.json --format lplb --cluster nowhere.yaml --out new.json",
    "place report": "nowhere.json --trace nowhere.npz --out new.html",
    "place migrate": "nowhere.json other.json --out new.json",
    "place tiers": "--hardware nowhere.toml --expert-size 1MB --trace nowhere.npz --out new.json",
    "place run": "nowhere.json --trace nowhere.npz",
    "place part": "nowhere.json --node 0 --out new.json",
    "place cluster": "nowhere.xml --out new.yaml",
    "place export": "nowhere.json --format sglang --out new.json",
    "place loads": "nowhere.pt --format sglang --out new.json",
    "export": "nowhere --to olmoe --out new",
    "convert": "nowhere --to latent --group 2 --rank 2 --out new",
    "refactor": "nowhere --data nowhere.txt --data other.txt --out new",
    "upcycle": "nowhere --experts 2 --top-k 1 --out new",
    "prune": "nowhere --keep 2 --out new",
    "join": "nowhere nowhere --out new",
    "bricks": "grow nowhere --units 2 --out new",
    "merge": "nowhere nowhere --out new",
    "train": "--data nowhere.txt --out new",
    "compare": "--routers top2 --data nowhere.txt --out new",
    "judge": "nowhere",
    "leverage": "--config nowhere.yaml",
    "sweep": "--routers top2 --data nowhere.txt --out new",
    "demo": "--data nowhere.txt --out new",
    "tune-router": "nowhere --out new",
    "bench offload": "nowhere",
    "bench finetune": "nowhere",
    "bench finetune-domains": "--model nowhere",
    "bench locality": "--data nowhere.txt --out new",
    "bench duo": "--data nowhere.txt --out new",
    "bench placement": "--loads nowhere.json",
    "bench serve": "nowhere",
    "bench starts": "--data nowhere.txt",
    "bench tiers": "--trace nowhere.npz",
}
READS_NOTHING = {
    "bench before-pass", "bench claim", "bench flax", "bench forecast", "bench kernels", "bench latent-experts",
    "bench load", "bench low-bits", "bench members", "bench memory-layers", "bench overlap", "bench pregated",
    "bench products", "bench routers", "bench step", "bench streamed", "bench train", "bench units",
}  # fmt: skip


def test_every_command_that_reads_a_file_is_in_the_table():
    assert {" ".join(path) for path in ALL} == MISSING.keys() | READS_NOTHING


@pytest.mark.parametrize("command", MISSING)
def test_a_missing_file_is_one_line(command, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*command.split(), *MISSING[command].split()) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert "nowhere" in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


GARBAGE = {
    "simulate": "FILE --cache-experts 2",
    "trace show": "FILE",
    "trace predictor": "FILE --out new.npz",
    "trace batches": "FILE",
    "fit": "FOLDER",
    "pack": "FOLDER --out new",
    "dequantise": "FOLDER --out new",
    "quality": "FOLDER --against FOLDER --data nowhere",
    "generate": "FOLDER --prompt a",
    "place score": "FILE --trace FILE",
    "place check": "FILE --trace FILE",
    "place tiers": "--hardware FILE --expert-size 1MB --trace FILE --out new.json",
}


@pytest.mark.parametrize("command", GARBAGE)
@pytest.mark.parametrize("data", [b"", b"\x80\x04]", b"PK\x03\x04garbage", b"[]", b'{"a": 1}'], ids=repr)
def test_garbage_is_one_line_in_our_words(command, data, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.npz").write_bytes(data)
    (tmp_path / "folder").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "folder" / name).write_bytes(data)
    arguments = GARBAGE[command].replace("FILE", "file.npz").replace("FOLDER", "folder").split()
    assert run(*command.split(), *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert "file.npz" in error or "folder" in error
    for foreign in ("pickle", "allow_pickle", "BadZipFile", "zip file", "Traceback", "site-packages"):
        assert foreign not in error


def _trace(file):
    expert_TLK = np.stack([np.random.default_rng(row).permutation(8)[:2] for row in range(60)])[:, None]
    RoutingTrace(
        expert_TLK=expert_TLK.astype(np.int16), sequence_T=np.repeat([0, 1], 30), metadata={"num_experts": 8}
    ).save(file)


NAME = "[red]a[/b] :smile: [0]"


def test_names_are_printed_as_they_are(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / NAME.replace("/", "")
    folder.mkdir()
    _trace(folder / "t.npz")
    out = folder / "new.npz"
    np.savez(folder / "routes.npz", routed_experts=np.random.default_rng(0).integers(0, 8, (9, 2, 2)))
    assert run("trace", "import", folder / "routes.npz", "--format", "npz", "--out", out) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert run("generate", folder / "none", "--prompt", "a") == 2
    assert str(folder / "none") in capsys.readouterr().err
    assert run("simulate", folder / "none.npz", "--cache-experts", 2) == 2
    assert str(folder / "none.npz") in capsys.readouterr().err
    assert run("simulate", folder / "t.npz", "--cache-experts", 2, "--policy", NAME) == 2
    assert NAME in capsys.readouterr().err


def test_version(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("expertier")


@pytest.mark.parametrize(
    "command",
    [pytest.param(["--help"], marks=pytest.mark.slow), ["simulate", "t.npz", "--cache-experts", "2"]],
    ids=["help", "simulate"],
)
def test_a_closed_pipe_ends_quietly(command, tmp_path):
    _trace(tmp_path / "t.npz")
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *command],
        cwd=tmp_path,
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (1, 141)


def test_the_hint_for_a_missing_library_is_a_line_that_works(tmp_path):
    _trace(tmp_path / "t.npz")
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers']))"
    program = f"{block}; sys.argv = ['expertier', 'fit', '.']; from experiments.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -c constraints.txt -e '.[torch]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_simulate_says_what_the_number_of_experts_means(run, tmp_path, capsys):
    expert_TLK = np.stack([np.random.default_rng(row).permutation(8)[:2] for row in range(180)]).reshape(60, 3, 2)
    RoutingTrace(
        expert_TLK=expert_TLK.astype(np.int16), sequence_T=np.zeros(60, np.int32), metadata={"num_experts": 8}
    ).save(tmp_path / "t.npz")
    assert run("simulate", tmp_path / "t.npz", "--cache-experts", 4) == 0
    shown = capsys.readouterr()
    assert "4 experts of all layers together: 4 of 24" in shown.out
    assert "one token uses 6 experts (3 layers x 2)" in shown.err
    assert "admits all that it reads" in shown.out
    assert run("simulate", tmp_path / "t.npz", "--cache-experts", 4, "--per-layer") == 0
    shown = capsys.readouterr()
    assert "4 experts of each layer: 12 of 24" in shown.out
    assert shown.err == ""


def test_rates_are_named_in_words_and_what_is_not_there_is_left_out(capsys, monkeypatch):
    from offload.commands.machine import WORDS, show_rates
    from routing.ground.hardware import Hardware

    monkeypatch.setenv("COLUMNS", "120")
    rates = dict.fromkeys(("disk", "cached", "memory", "exact"), 2e9)
    show_rates(
        Hardware(**{f"{name}_bytes_per_s": rate for name, rate in rates.items()}, fast_bytes_per_s=0, layer_s=3e-5)
    )
    shown = capsys.readouterr().out
    assert WORDS.keys() == vars(Hardware(**dict.fromkeys(WORDS, 1.0))).keys()
    assert "2.00 GB/s" in shown
    assert "30.0 us" in shown
    assert "0.00" not in shown
    assert "GPU" not in shown
