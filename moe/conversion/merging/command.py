"""`expertier merge`: several models as one, or fewer experts of one model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from routing import RoutingTrace
from routing.ground.expect import expect_name, expect_new, expect_outputs
from routing.ground.files import write_json

from ...parts.text import token_rows
from ..flags import flag, from_flags, with_flags
from ..prune_and_join import num_experts, usage
from ..prune_and_join_commands import expect_checkpoints, expect_one_tokenizer, load, save_beside
from .checkpoints import average, merge_checkpoints, sparse_task_vectors
from .experts import SIMILARITIES, facts_on, merge_experts
from .task_vectors import TaskVectors

METHODS = ("average", "sparse-task-vectors", "experts")
ROW_LENGTH = 512
"""Tokens of one sequence that experts are compared on."""


@dataclass(frozen=True, kw_only=True)
class ExpertMerging:
    """How experts of one model are merged.

    Args:
        keep: experts of each layer that are left.
        similarity: what is compared: `outputs` on a text, or `weights`.
        tokens: of the text, at most.
        align: permute hidden channels to match before averaging.
    """

    keep: int | None = flag("Experts of each layer to keep (method experts).", default=None, min=1)
    similarity: str = flag("Compare experts by their outputs on --data, or by their weights.", default="outputs")
    tokens: int = flag("Tokens of the text, at most.", default=2048, min=2)
    align: bool = flag("Permute hidden channels to match before averaging experts.", default=False)


@with_flags(TaskVectors, ExpertMerging)
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Checkpoint folders; one for experts.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist yet.")],
    method: Annotated[str, typer.Option("--method", help="average, sparse-task-vectors or experts.")] = "average",
    base: Annotated[Path | None, typer.Option("--base", help="The model that task vectors start from.")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="One per model, such as 1,2; default: equal.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Compare and weigh experts on this text.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Weigh experts by their use in this trace.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare drops.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
    **flags: Any,
) -> None:
    """Merge models of one architecture by averages or sparse task vectors, or the experts of one model.

    Example: `expertier merge runs/a runs/b --base runs/start --method sparse-task-vectors --out runs/both`
    """
    expect_name(method, METHODS, "method (--method)")
    expect_checkpoints(*folders)
    expect_new(out)
    expect_outputs(json_file, inputs=[*folders, base, data, trace])
    if method == "experts":
        report = _merge_experts(folders, out, from_flags(ExpertMerging, flags), data, trace)
    else:
        how = from_flags(TaskVectors, flags)
        report = _merge_checkpoints(folders, out, method, base, _numbers(weights), how, seed)
    if json_file is not None:
        write_json(json_file, {"method": method, "models": [str(folder) for folder in folders], **report})
    typer.echo(f"{out}: {report['summary']}")


def _merge_checkpoints(
    folders: list[Path],
    out: Path,
    method: str,
    base: Path | None,
    weights: list[float] | None,
    how: TaskVectors,
    seed: int,
) -> dict[str, Any]:
    if method == "average":
        if base is not None:
            raise ValueError("an average has no base; leave out --base, or choose --method sparse-task-vectors")
        if len(folders) < 2:
            raise ValueError("an average needs two models or more")
        combine = average(folders, weights)
    else:
        if base is None:
            raise ValueError("task vectors are differences from a base model; give it with --base")
        expect_checkpoints(base)
        folders = [base, *folders]
        combine = sparse_task_vectors(folders, how, seed, weights)
    expect_one_tokenizer(*folders)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("merging", total=None)
        count = merge_checkpoints(
            folders, out, combine, lambda done, total: progress.update(task, completed=done, total=total)
        )
    merged_models = len(folders) - (method != "average")
    return {"tensors": count, "summary": f"{count} tensors of {merged_models} models merged by {method}"}


def _merge_experts(
    folders: list[Path], out: Path, how: ExpertMerging, data: Path | None, trace: Path | None
) -> dict[str, Any]:
    expect_name(how.similarity, SIMILARITIES, "similarity (--similarity)")
    if len(folders) != 1:
        raise ValueError(
            "--method experts merges the experts of one model; put those of two together with `join` first"
        )
    if how.keep is None:
        raise ValueError("say how many experts of each layer are left: --keep N")
    if how.similarity == "outputs" and data is None:
        raise ValueError("experts are compared by their outputs on a text; give --data, or --similarity weights")
    (folder,) = folders
    count_LE = None if trace is None else usage(RoutingTrace.load(trace))
    model = load(folder)
    facts = None
    if data is not None:
        facts = facts_on(model, token_rows(folder, model.config.vocab_size, [data], ROW_LENGTH, how.tokens))
    found = merge_experts(
        model,
        how.keep,
        similarity=how.similarity,
        facts=facts,
        count_LE=count_LE,
        align=how.align,
    )
    E = num_experts(model.config)
    save_beside(found.model, folder, out)
    kept = [sum(len(group) == 1 for group in groups) for groups in found.groups]
    return {
        "groups": found.groups,
        "summary": f"{how.keep} of {E} experts per layer; {np.mean(kept):.1f} of them are single old ones",
    }


def _numbers(weights: str | None) -> list[float] | None:
    if weights is None:
        return None
    try:
        return [float(part) for part in weights.split(",")]
    except ValueError as error:
        raise ValueError(f"--weights takes numbers with commas between them; got {weights!r}") from error
