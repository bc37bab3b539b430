"""The one `expertier` command: joins what the packages own, and turns errors into one line and an exit code."""

import sys

import typer
from rich.console import Console

import offload.cli
import placement.cli
import routing.cli

app = typer.Typer(
    name="expertier",
    help="Train small mixture-of-experts variants, run models whose experts do not fit in fast memory, "
    "and solve where experts should live.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130


@app.callback()
def options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Options that every command accepts, in any place; `main` reads them before Typer does."""


routing.cli.trace_app.command("record")(offload.cli.record)
app.add_typer(routing.cli.trace_app, name="trace")
app.add_typer(offload.cli.app)
app.add_typer(placement.cli.app, name="place")


def main() -> None:
    """Run the command line; exit 2 for bad input, 1 for a failure, 130 after Ctrl-C, without a traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except typer.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except typer.exceptions.TyperException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        is_input = isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | PermissionError)
        _complain(_one_line(error) if is_input else f"{type(error).__name__}: {_one_line(error)}")
        sys.exit(BAD_INPUT if is_input else FAILURE)


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]expertier:[/] {message}", highlight=False)


if __name__ == "__main__":
    main()
