"""The one `expertier` command: joins what the packages own, and turns errors into one line and an exit code."""

import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.text import Text

import offload.cli
import placement.cli
import routing.cli
from routing.ground.terminal import plain_console

from .bench.claims.bench import bench_claim
from .bench.duo.bench import bench_duo
from .bench.expert_kernels.bench import bench_kernels
from .bench.flax import bench_flax
from .bench.forecasts import bench_forecast
from .bench.layers.latent import bench_latent_experts
from .bench.layers.memory import bench_memory_layers
from .bench.leverage import leverage
from .bench.locality.bench import bench_locality
from .bench.low_bits.bench import bench_low_bits
from .bench.offloading.bench import bench_offload
from .bench.overlap import bench_overlap
from .bench.placement_solvers import bench_placement
from .bench.placement_tiers import bench_tiers
from .bench.products import bench_products
from .bench.routers import routers as bench_routers
from .bench.serving.bench import bench_serve
from .bench.starting_points import bench_starts
from .bench.step import bench_step
from .bench.systems.before_pass import bench_before_pass
from .bench.systems.loading import bench_load
from .bench.systems.members import bench_members
from .bench.systems.pregated import bench_pregated
from .bench.systems.streamed import bench_streamed
from .bench.systems.units import bench_units
from .bench.training import bench_train
from .bench.tuning.bench import bench_finetune
from .bench.tuning.domains import bench_domains
from .compare.command import compare
from .compare.sweep_command import sweep
from .demo.command import demo
from .judging.command import judge
from .placed.command import place_run
from .placed.serving import PROCESSES
from .train.command import train
from .train.distributed.launch import LOST, is_worker
from .tune_router.command import tune_router

app = typer.Typer(
    name="expertier",
    help="Train small mixture-of-experts variants, run models whose experts do not fit in fast memory, "
    "and solve where experts should live.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

bench = typer.Typer(help="Measurements whose numbers are quoted anywhere.", no_args_is_help=True)

# exit codes: 2 as shells use it for wrong usage, 130 = 128 + SIGINT
BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
CLOSED_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended."""
EXTRAS = dict.fromkeys(("torch", "transformers", "safetensors", "pyarrow"), "torch") | dict.fromkeys(
    ("jax", "flax", "optax", "einops"), "jax"
)
EXTRAS["peft"] = "finetune"
EXTRAS |= {"tensorboard": "tensorboard"}
EXTRAS |= dict.fromkeys(("fastapi", "uvicorn", "llguidance", "prometheus_client", "prompt_toolkit", "httpx"), "serve")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"expertier {version('expertier')}")
        except PackageNotFoundError:
            typer.echo("expertier, run from its folder without being installed")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options that every command accepts, in any place; `main` reads them before Typer does."""


app.command("demo")(demo)
app.command("train")(train)
app.command("compare")(compare)
app.command("sweep")(sweep)
app.command("judge")(judge)
app.command("leverage")(leverage)
bench.command("before-pass")(bench_before_pass)
bench.command("claim")(bench_claim)
app.command("tune-router")(tune_router)
bench.command("duo")(bench_duo)
bench.command("finetune")(bench_finetune)
bench.command("finetune-domains")(bench_domains)
bench.command("flax")(bench_flax)
bench.command("forecast")(bench_forecast)
bench.command("kernels")(bench_kernels)
bench.command("latent-experts")(bench_latent_experts)
bench.command("load")(bench_load)
bench.command("locality")(bench_locality)
bench.command("low-bits")(bench_low_bits)
bench.command("members")(bench_members)
bench.command("memory-layers")(bench_memory_layers)
bench.command("offload")(bench_offload)
bench.command("overlap")(bench_overlap)
bench.command("placement")(bench_placement)
bench.command("pregated")(bench_pregated)
bench.command("products")(bench_products)
bench.command("routers")(bench_routers)
bench.command("serve")(bench_serve)
bench.command("starts")(bench_starts)
bench.command("tiers")(bench_tiers)
bench.command("step")(bench_step)
bench.command("streamed")(bench_streamed)
bench.command("train")(bench_train)
bench.command("units")(bench_units)
app.add_typer(bench, name="bench")
offload.cli.join_processes(PROCESSES)
offload.cli.join_trace(routing.cli.trace_app)
app.add_typer(routing.cli.trace_app, name="trace")
app.add_typer(offload.cli.app)
placement.cli.app.command("run")(place_run)
app.add_typer(placement.cli.app, name="place")


PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command("export", context_settings=PASSED_ON)
def export(context: typer.Context) -> int | None:
    """Write a trained model as a native transformers family, so that other engines load it unchanged."""
    return _pass_on("export", context)


@app.command("convert", context_settings=PASSED_ON)
def convert(context: typer.Context) -> int | None:
    """Turn a trained mixture of experts into one with latent experts, with null experts, or with pre-gates."""
    return _pass_on("convert", context)


@app.command("refactor", context_settings=PASSED_ON)
def refactor(context: typer.Context) -> int | None:
    """Cut a small dense model into experts by domain, with one router over token ids for all layers."""
    return _pass_on("refactor", context)


@app.command("upcycle", context_settings=PASSED_ON)
def upcycle(context: typer.Context) -> int | None:
    """Turn a dense model into a mixture of experts that computes the same, to train on from there."""
    return _pass_on("upcycle", context)


@app.command("prune", context_settings=PASSED_ON)
def prune(context: typer.Context) -> int | None:
    """Keep some experts of each layer of a trained model: those most used in a trace, or random ones."""
    return _pass_on("prune", context)


@app.command("join", context_settings=PASSED_ON)
def join(context: typer.Context) -> int | None:
    """Put the experts of two trained models of one backbone beside each other."""
    return _pass_on("join", context)


@app.command("bricks", context_settings=PASSED_ON)
def bricks(context: typer.Context) -> int | None:
    """Take a dense model's feed-forward units as bricks: keep those of a text, merge, update from another, or add."""
    return _pass_on("bricks", context)


@app.command("merge", context_settings=PASSED_ON)
def merge(context: typer.Context) -> int | None:
    """Merge models of one architecture by averages or sparse task vectors, or the experts of one model."""
    return _pass_on("merge", context)


def _pass_on(command: str, context: typer.Context) -> int | None:
    """The exit code of a command of `moe`: 130 after Ctrl-C, which Typer returns rather than raises."""
    # importing moe imports torch and transformers, which `expertier --help` and `expertier place` do without
    import moe.cli

    moe.cli.join_plain_copy(lambda file, out: offload.dequantise(file, out))
    return moe.cli.app([command, *context.args], prog_name="expertier", standalone_mode=False)


@cache
def _command() -> typer.core.TyperGroup:
    """All commands as Typer makes them; calling `app` would make them at each call."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; exit 2 for bad input, 1 for a failure, 130 after Ctrl-C, without a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too; commands show their own
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = _command()(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # what Typer makes of Ctrl-C
            _say_interrupted()
        sys.stdout.flush()
        sys.exit(code)
    except typer.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except typer.exceptions.TyperException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        _say_interrupted()
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _leave_closed_pipe()
    except ModuleNotFoundError as error:
        if debug or error.name not in EXTRAS:
            raise
        _complain(
            f"this command needs {error.name}; in the folder of expertier's sources, install it with: "
            f"pip install -c constraints.txt -e '.[{EXTRAS[error.name]}]'"
        )
        sys.exit(BAD_INPUT)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ConnectionError) and is_worker():
            sys.exit(LOST)
        is_input = isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | PermissionError)
        _complain(_one_line(error) if is_input else f"{type(error).__name__}: {_one_line(error)}")
        sys.exit(BAD_INPUT if is_input else FAILURE)


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _complain(message: str) -> None:
    plain_console(stderr=True, soft_wrap=True).print(Text.assemble(("expertier:", "bold red"), " ", message))


def _say_interrupted() -> None:
    """Once, however many processes there are: who started the others says it."""
    if not is_worker():
        _complain("interrupted")


def _leave_closed_pipe() -> None:
    """End without a word when the reader of our output has gone, as `| head` does."""
    # Python flushes stdout once more at exit; that must not fail again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CLOSED_PIPE)


if __name__ == "__main__":
    main()
