"""`expertier bricks`: retrieve, merge, update or grow the feed-forward units of a dense checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_name, expect_new, expect_outputs
from routing.ground.files import write_json

from ..layer_by_layer import loss_of
from ..opening import load_model
from ..prune_and_join_commands import save_beside

NEEDS = {"retrieve": ("data", "units"), "merge": ("other",), "update": ("data", "other", "units"), "grow": ("units",)}
"""What each operation cannot do without."""


def bricks(
    operation: Annotated[str, typer.Argument(help=f"One of {', '.join(NEEDS)}.")],
    model: Annotated[Path, typer.Argument(metavar="DENSE_DIR", help="A dense Llama-type checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    other: Annotated[Path | None, typer.Option("--with", help="merge, update: a checkpoint of equal sizes.")] = None,
    data: Annotated[Path | None, typer.Option(help="retrieve, update: the text whose units are meant.")] = None,
    units: Annotated[int | None, typer.Option(min=1, help="Per layer: kept, updated, or added.")] = None,
    share: Annotated[float, typer.Option(help="merge: of the second checkpoint in the mean, 0 to 1.")] = 0.5,
    tokens: Annotated[int, typer.Option(min=2, help="At most so many of the text are read.")] = 16_384,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report there.")] = None,
) -> None:
    """Take a dense model's feed-forward units as bricks: keep those of a text, merge, update from another, or add.

    Example: `expertier bricks retrieve tiny-llama --data code.txt --units 512 --out tiny-code`
    """
    expect_name(operation, NEEDS, "operation")
    given = {"data": data, "other": other, "units": units}
    flags = {"data": "--data", "other": "--with", "units": "--units"}
    if missing := [flags[name] for name in NEEDS[operation] if given[name] is None]:
        raise ValueError(f"{operation} needs {' and '.join(missing)}")
    if unused := [flags[name] for name in given if given[name] is not None and name not in NEEDS[operation]]:
        raise ValueError(f"{operation} takes no {' and no '.join(unused)}")
    expect_new(out)
    expect_outputs(json_file, inputs=[path for path in (model, other, data) if path is not None])
    first = load_model(model, dtype="auto")
    second = None if other is None else load_model(other, dtype="auto")
    report = _run(operation, first, second, model, data, units, share, tokens)
    save_beside(first, model, out)
    if json_file is not None:
        write_json(json_file, {"operation": operation, "model": str(model), "out": str(out), **report})
    losses = "".join(f"; {name.replace('_', ' ')} {value:.4f}" for name, value in report.items() if "loss" in name)
    typer.echo(f"{out}: {operation}, {report['units']} units per layer{losses}")


def _run(
    operation: str,
    model: Any,
    other: Any,
    folder: Path,
    data: Path | None,
    units: int | None,
    share: float,
    tokens: int,
) -> dict[str, Any]:
    """Changes the model; the report has the loss on the text (nats per token) before and after, where there is one."""
    import torch

    from ...parts.text import token_rows
    from .units import grow, merge, retrieve, strength, update

    def loss() -> float:
        with torch.no_grad():
            return loss_of(model.model(token_BS, use_cache=False).last_hidden_state, model.lm_head, token_BS)

    report: dict[str, Any] = {}
    if data is not None:
        token_BS = token_rows(folder, model.config.vocab_size, [data], 128, tokens)
        report["loss_before"] = loss()
        strength_LF = strength(model, token_BS)
    if operation == "retrieve":
        retrieve(model, strength_LF, units)
    elif operation == "update":
        update(model, other, strength_LF, units)
    elif operation == "merge":
        merge(model, other, share)
    else:
        grow(model, units)
    if data is not None:
        report["loss_after"] = loss()
    return report | {"units": model.config.intermediate_size}
